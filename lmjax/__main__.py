"""`python -m lmjax VERB`; see lmjax/cli.py."""

from lmjax.cli import main

if __name__ == "__main__":
    main()
