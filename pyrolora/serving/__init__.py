"""A server of posteriors: many on one network, each answer with its uncertainty.

Nothing is imported here: the registry and the queue need no web framework, and the command line
names what to install before `app` asks for one.
"""
