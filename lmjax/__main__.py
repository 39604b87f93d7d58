"""`python -m lmjax VERB`; see lmjax/cli/verbs.py."""

from lmjax.console import opening

if __name__ == "__main__":
    opening.use_huge_pages()
    opening.begin()
    from lmjax.cli.verbs import main

    main()
