"""jaxmoe: Mixture-of-Experts inference in less accelerator memory than the model needs.

Importing this package imports nothing. The public names below load their module when first asked for.
"""

__version__ = "0.1.0"

# Public name -> module that defines it.
_PUBLIC = {
    "ModelSpec": "jaxmoe.spec",
}


def __getattr__(name):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *_PUBLIC})
