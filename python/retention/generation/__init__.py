"""Text from models of both kinds, runs of `retention train` and folders of transformers, on the
command line: what it prints, and how long it takes.

Modules import downwards only, in this order:

    command.py      `retention generate`
    chat.py         `retention chat`
    plot.py         how long it took, drawn
    speed.py        the same as a table
    models.py       which kind lies in a folder, and what both can do
    folders.py      models of transformers; text.py: their tokens, as text
    runs.py         runs of `retention train`
    base.py         what a model is asked for, and what it is
    stream.py       what a thread gives while it works
"""
