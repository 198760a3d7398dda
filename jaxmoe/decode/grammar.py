"""Follow a grammar over tokens: which may come next, given those so far.

Host side: llguidance (extra `serve`) parses, this file holds it to a contract. What it relies on and what it guards against:

- A matcher of llguidance that meets an invalid token, or a limit, is in error for good, and a limit takes all its copies along. Here an invalid token
  changes nothing, and every text has its own.
- End-of-text never reaches the parser: it is allowed where what was generated is complete, there alone, and after it nothing else is.
- Compilation recurses natively, and would end the process where a chain of rules is deeper than the stack. So sources are bounded, and compiled on a
  thread whose stack has room for the deepest one.

Grammars depend on the tokenizer alone. This file knows no logits, requests or batches.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from jaxmoe.decode.grammar_text import (
    MAX_TEXT_BYTES,
    NO_TOKEN,
    GrammarError,
    bounded,
    choices_as_lark,
    reason,
    schema_as_lark,
    with_plain_decoder,
)

STACK_BYTES = 256 * 2**20
"""Four times what the worst of many kinds of chains took for a source of MAX_SCHEMA_BYTES (llguidance 1.9.1: 60 MiB)."""
# The first bounds compilation (large everyday schemas take less than half), the second one mask. Beyond them: an error, of that text alone.
LIMITS = dict(initial_lexer_fuel=100_000, step_lexer_fuel=100_000, max_lexer_states=50_000, verbose_errors=False)
# Else, where one text alone can follow, the mask would have nothing but the token that the tokenizer's own code makes of it out of context: with
# normalizers and prefixes not always one that the grammar takes. The model decides how a text is cut into tokens.
NO_FORCING = '%llguidance {"no_forcing": true}'

T = TypeVar("T")
_starting = threading.Lock()


class Matcher:
    """One text's place in its grammar; for one thread. Made by `Grammar.matcher`."""

    def __init__(self, inner: Any, eos_ids: tuple[int, ...], vocab: int, tokens: int = 0, ends: int = 0):
        """For `Grammar.matcher` and `copy`.

        Args:
            inner: llguidance's matcher.
            eos_ids: tokens that end a text.
            vocab: V.
            tokens: how many tokens it consumed.
            ends: how many end-of-text tokens came after them.
        """
        self._inner, self._eos_ids, self._vocab = inner, eos_ids, vocab
        self._tokens, self._ends = tokens, ends

    @property
    def accepting(self) -> bool:
        """Whether the text is complete as it is; end-of-text is allowed exactly then."""
        return self._ends > 0 or (self._inner.is_accepting() and not self._inner.is_error())

    @property
    def finished(self) -> bool:
        """Whether nothing but end-of-text may follow, or it has come. Of a few grammars (the empty text's) only the mask shows it."""
        return self._ends > 0 or (self._inner.is_stopped() and not self._inner.is_error())

    def mask(self) -> np.ndarray:
        """The tokens that may come next.

        Returns:
            u32[ceil(V/32)]: bit j of word w is token 32w + j. At least one is set, those that `consume` would take, and none beyond the tokenizer's.

        Raises:
            GrammarError: the grammar has become too complex to follow, or no token can come next (of a vocabulary that does not spell all bytes).
        """
        self._raise_error()
        accepting = self.accepting
        words = -(-self._vocab // 32)
        if self.finished:
            found = np.zeros(words, np.uint32)
        else:  # a word more than these comes of a vocabulary that fills its last one
            found = np.frombuffer(self._inner.compute_bitmask(), np.uint32)[:words].copy()
        self._raise_error()
        for token in self._eos_ids:
            bit = np.uint32(1 << (token % 32))
            found[token // 32] = found[token // 32] | bit if accepting else found[token // 32] & ~bit
        if not found.any():
            raise GrammarError(f"the grammar cannot be followed: {NO_TOKEN}")
        return found

    def consume(self, token: int) -> bool:
        """Go on by one token.

        Args:
            token: an id in [0, V).

        Returns:
            Whether it was allowed; if not, nothing has changed. After end-of-text, only end-of-text is.

        Raises:
            GrammarError: the grammar has become too complex to follow.
        """
        if token in self._eos_ids:
            allowed = self.accepting
            self._ends += allowed
            return allowed
        if self._ends or not 0 <= token < self._vocab:
            return False
        allowed = self._inner.try_consume_tokens([int(token)]) == 1
        self._raise_error()
        self._tokens += allowed
        return allowed

    def rollback(self, count: int) -> None:
        """Take back the last tokens consumed; what follows is as if they had never come.

        Args:
            count: how many; end-of-text counts.

        Raises:
            ValueError: there are not so many.
            GrammarError: the grammar is in error.
        """
        if not 0 <= count <= self._tokens + self._ends:
            raise ValueError(f"cannot take back {count} tokens of {self._tokens + self._ends}")
        ends = min(count, self._ends)
        self._ends -= ends
        if count > ends:
            self._raise_error()
            if not self._inner.rollback(count - ends):
                raise GrammarError(f"the grammar cannot go back by {count} tokens: {reason(self._inner.get_error())}")
            self._tokens -= count - ends

    def validate(self, tokens: Sequence[int]) -> int:
        """How many of these tokens could come next, in a row; the place does not change.

        Args:
            tokens: ids, of a draft for example.

        Returns:
            Length of the longest valid prefix.

        Raises:
            GrammarError: as `consume`.
        """
        probe = self.copy()
        return next((i for i, token in enumerate(tokens) if not probe.consume(token)), len(tokens))

    def copy(self) -> Matcher:
        """Another matcher at the same place, that goes its own way, on the same thread. If one of them meets a limit, both are in error."""
        return Matcher(self._inner.deep_copy(), self._eos_ids, self._vocab, self._tokens, self._ends)

    def _raise_error(self) -> None:
        if self._inner.is_error():
            raise GrammarError(f"the grammar cannot be followed: {reason(self._inner.get_error())}")


class Grammar:
    """A compiled grammar, to be followed by any number of texts; threads may share it.

    Attributes:
        kind: which kind it was compiled from, such as 'json_schema'.
    """

    def __init__(self, kind: str, build: Callable[[], Any], first: Any, eos_ids: tuple[int, ...], vocab: int):
        """For `GrammarCompiler`.

        Args:
            kind: see the class.
            build: gives another of llguidance's matchers, at the beginning.
            first: one that it gave.
            eos_ids: tokens that end a text.
            vocab: V.
        """
        self.kind = kind
        self._build, self._first = build, first
        self._eos_ids, self._vocab = eos_ids, vocab
        self._lock = threading.Lock()

    def matcher(self, tokens: Iterable[int] = ()) -> Matcher:
        """A matcher at the beginning, or after the tokens of a text that was put aside.

        The first costs nothing, each further one a compilation (a millisecond where the grammar is not large): llguidance's copies share a lexer, and
        a text that takes it beyond a limit would end the others too.

        Args:
            tokens: ids generated so far.

        Raises:
            GrammarError: they are no text of this grammar.
        """
        with self._lock:
            inner, self._first = self._first, None
        inner = _on_deep_stack(self._build) if inner is None else inner
        matcher = Matcher(inner, self._eos_ids, self._vocab)
        for i, token in enumerate(tokens):
            if not matcher.consume(token):
                raise GrammarError(f"token {token}, number {i}, is not allowed by the grammar after those before it")
        return matcher


class GrammarCompiler:
    """Compiles grammars for one tokenizer; threads may share it.

    Attributes:
        vocab: V.
        eos_ids: tokens that end a text.
    """

    def __init__(self, tokenizer: str | Path, vocab: int, eos_ids: Iterable[int]):
        """Read the tokenizer.

        Args:
            tokenizer: path of a tokenizer.json, or its text.
            vocab: V, of the logits; it may be larger than the tokenizer's.
            eos_ids: tokens that end a text, at least one.

        Raises:
            ImportError: llguidance is not installed.
            ValueError: eos_ids are none or lie outside the vocabulary, or the tokenizer cannot be used (larger than `vocab`, or of a kind whose
                tokens' bytes are not known).
        """
        self._llguidance = _import_llguidance()
        self.vocab, self.eos_ids = vocab, tuple(int(token) for token in eos_ids)
        wrong = [token for token in self.eos_ids if not 0 <= token < vocab]
        if wrong or not self.eos_ids:
            raise ValueError(f"eos_ids are {list(self.eos_ids)}; a grammar needs at least one, all in [0, {vocab})")
        text = str(tokenizer) if str(tokenizer).lstrip().startswith("{") else Path(tokenizer).read_text(encoding="utf-8")
        try:
            self._tokenizer = self._llguidance.LLTokenizer(with_plain_decoder(text), n_vocab=vocab, eos_token=list(self.eos_ids))
        except ValueError as error:
            raise ValueError(f"grammars cannot use this tokenizer: {reason(str(error))}") from error
        self._limits = self._llguidance.LLParserLimits(**LIMITS)

    def json_schema(self, schema: Mapping[str, Any] | bool | str, compact: bool = True) -> Grammar:
        """Texts that are JSON and meet a schema, with an object's properties in the schema's order.

        Args:
            schema: a JSON schema, or its text. Keywords that cannot be enforced are refused, not ignored.
            compact: no white space between marks; otherwise up to `MAX_SPACES` characters of it.

        Raises:
            GrammarError: it is too large, no JSON schema, one that nothing meets, or one that cannot be enforced.
        """
        return self._compile("json_schema", schema_as_lark(schema, compact))

    def json_object(self, compact: bool = True) -> Grammar:
        """Texts that are any JSON object; `compact` as in `json_schema`."""
        return self.json_schema({"type": "object"}, compact)

    def regex(self, pattern: str) -> Grammar:
        """Texts that a regular expression matches from beginning to end.

        Args:
            pattern: in the syntax of Rust's regex crate, without look-around.

        Raises:
            GrammarError: it is too large or no such expression.
        """
        text = bounded("a regular expression", pattern, MAX_TEXT_BYTES)
        try:
            written = json.loads(self._llguidance.LLMatcher.grammar_from_regex(text))
        except ValueError as error:
            raise GrammarError(f"regex: {error}") from None
        return self._compile("regex", written["grammars"][0]["lark_grammar"])

    def lark(self, grammar: str) -> Grammar:
        """Texts of a context-free grammar.

        Args:
            grammar: in llguidance's variant of Lark. It begins at the rule `start`; end-of-text tokens are not named in it.

        Raises:
            GrammarError: it is too large, no such grammar, or one of no text.
        """
        return self._compile("lark", bounded("a grammar", grammar, MAX_TEXT_BYTES))

    def choice(self, choices: Sequence[str]) -> Grammar:
        """Texts that are one of these, to the letter.

        Args:
            choices: at most `MAX_CHOICES` of them, none empty.

        Raises:
            GrammarError: there are none or too many, or one is empty.
        """
        return self._compile("choice", choices_as_lark(choices))

    def _compile(self, kind: str, lark: str) -> Grammar:
        def build() -> Any:
            inner = self._llguidance.LLMatcher(self._tokenizer, f"{lark}\n{NO_FORCING}", log_level=0, limits=self._limits)
            if inner.is_error():
                raise GrammarError(reason(inner.get_error()))
            Matcher(inner, self.eos_ids, self.vocab).mask()  # a grammar of no text shows here
            return inner

        try:
            return Grammar(kind, build, _on_deep_stack(build), self.eos_ids, self.vocab)
        except GrammarError as error:
            raise GrammarError(f"{kind}: {error}") from None


def _on_deep_stack(work: Callable[[], T]) -> T:
    """What `work` gives, run on a thread whose stack is STACK_BYTES."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # a panic of native code is no Exception
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    with _starting:  # the size is one setting for all threads
        before = threading.stack_size(STACK_BYTES)
        try:
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()
    if errors:
        raise errors[0] if isinstance(errors[0], GrammarError) else GrammarError(reason(str(errors[0]))) from errors[0]
    return results[0]


def _import_llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise ImportError("structured output needs llguidance: pip install 'jaxmoe[serve]'") from error
    return llguidance
