"""No kernel yet: everything is refused, and plain XLA runs."""


def paged_attention(*args, **kwargs):
    raise NotImplementedError("there is no kernel yet")
