"""A small language model over bytes, built on `retention.nn.PowerRetention`: train, then generate.

`config` says what a run is, `data` where its bytes come from, `model` the network, `training` the
loop, `run` the folder it writes, `checkpoint` what makes it resumable, `plot` and `progress` what
one sees of it, and `generation` the text that comes out.
"""
