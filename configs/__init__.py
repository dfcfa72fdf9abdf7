"""Configurations of training runs, one file for each published stage; ``get_config()`` of each gives a `RunConfig`."""
