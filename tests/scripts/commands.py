"""Runs a script of ours inside this process: starting Python and importing jax takes longer than what is tested."""

import contextlib
import importlib.util
import io
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def load(name: str):
    """The module of scripts/NAME.py."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their annotations up there
    spec.loader.exec_module(module)
    return module


def call(module, *args, stdin: bytes = b"", out: io.StringIO | None = None) -> Done:
    """Calls the module's `main` as `python scripts/NAME.py ARGS` would; whatever isn't handled there is raised here."""
    out, err = out or io.StringIO(), io.StringIO()
    kept = jax.config.jax_compilation_cache_dir
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", [module.__file__, *map(str, args)])
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        try:
            code = module.main()
        except SystemExit as stopped:  # wrong arguments, by tyro
            code = stopped.code
        finally:
            jax.config.update("jax_compilation_cache_dir", kept)
            compilation_cache.reset_cache()
    return Done(code, out.getvalue(), err.getvalue())
