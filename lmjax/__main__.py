"""`python -m lmjax VERB`; see lmjax/verbs.py."""

from lmjax import opening

if __name__ == "__main__":
    opening.begin()
    from lmjax.verbs import main

    main()
