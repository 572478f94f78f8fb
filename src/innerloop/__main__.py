"""`python -m innerloop`: the command line."""

from innerloop.cli.main import main

if __name__ == "__main__":
    main()
