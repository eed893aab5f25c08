"""A server for one machine, with the endpoints of OpenAI's API: what `retention serve` runs.

`models.py` computes, `text.py` has the tokens' text, `steps.py` makes steps of many sequences,
`engine.py` decides whose, in a thread of its own, and needs no HTTP. Above it are `schema.py` (what
requests say), `answers.py` (what is answered), `app.py` (the endpoints), `guard.py` (key and size),
`metrics.py` and `server.py` (sockets, signals). Needs the extra `power-retention[serve]`.
"""
