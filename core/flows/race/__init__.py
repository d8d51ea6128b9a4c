"""The race: portlm's engines and the engines of others on the same weights, each in a process of its own.

What takes part is an `Entry` (contender.py), the class it names does the work, and `run` (race.py) is the protocol.
"""
