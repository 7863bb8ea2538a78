"""The verbs of the command line: one file each, with a frozen `Config` and `run(config, …)`.

A verb's options are the dataclasses that its `run` takes: its own `Config`, that of the model, … One whose options
depend on others adds `configs(arguments)`, which returns the dataclasses to fill.
"""
