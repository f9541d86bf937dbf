"""`python -m rag_assets` is `ragline`."""

from rag_assets.cli import main

main()
