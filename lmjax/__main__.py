"""`python -m lmjax VERB`; see lmjax/verbs.py."""

from lmjax.verbs import main

if __name__ == "__main__":
    main()
