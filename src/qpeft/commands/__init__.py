"""The verbs of the command line: one file each, with a frozen `Config` and `run(config)`.

A verb whose options depend on others adds `configs(arguments)`, which returns the dataclasses to fill.
"""
