"""The verbs of the command line; `innerloop.cli` makes a parser of their signatures."""
