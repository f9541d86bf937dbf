"""Python's collector of cyclic garbage, kept from holding up requests."""

import gc


def settle() -> None:
    """Once a process, when it has loaded what it will keep: full collections then look at what came later, not at every module and model.

    A full collection stops all threads. Over the modules of a query service it takes 100 ms, over those of an embedding service more.
    """
    gc.collect()
    gc.freeze()
