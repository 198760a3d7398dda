"""Text in and out: the tokenizer of a checkpoint folder, its chat template, streamed text, and stop strings.

Runs on the host, in plain Python. It knows token ids and strings; it does not know models, batches or requests.
"""

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# An unfinished UTF-8 character has at most 3 bytes, and no decoder writes more than one U+FFFD per byte.
UNFINISHED_CHARS = 3
# Tokens the stream keeps to decode again before it looks for a character boundary among them.
WINDOW_TOKENS = 8
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TextError(ValueError):
    """A tokenizer file, chat template, token id or stop string that cannot be used; the message says which and why."""


class Tokenizer:
    """The tokenizer of one checkpoint folder.

    Attributes:
        folder: where the files were read.
        eos_ids: ids that end a generation; empty where the folder names none. From generation_config.json's
            eos_token_id, else config.json's (or its text_config's), else the eos_token of tokenizer_config.json or
            special_tokens_map.json.
        special_tokens: name -> text, such as {"bos_token": "<s>"}; what chat templates are given.
        chat_template: the Jinja source, or None. From chat_template.jinja, else tokenizer_config.json.
    """

    def __init__(self, folder: str | Path):
        """Read the folder.

        Args:
            folder: holds tokenizer.json and, where the model has them, tokenizer_config.json, special_tokens_map.json,
                chat_template.jinja, generation_config.json and config.json.

        Raises:
            TextError: tokenizer.json is missing, a file is damaged, or the end token is not in the vocabulary.
        """
        self.folder = Path(folder)
        self._tokenizer = _read_tokenizer(self.folder / "tokenizer.json")
        config = _read_json(self.folder / "tokenizer_config.json")
        self.special_tokens = _special_tokens(_read_json(self.folder / "special_tokens_map.json") | config)
        self.chat_template = _read_chat_template(self.folder, config)
        self.eos_ids = self._find_eos_ids()
        added = self._tokenizer.get_added_tokens_decoder()
        self._skipped_ids = frozenset(id for id, token in added.items() if token.special)

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest id that stands for a token; a model may have more rows of logits than this."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Turn text into token ids, never truncated or padded.

        Args:
            text: any text. Special tokens that are written out in it become their ids.
            add_special_tokens: let the tokenizer's own post-processor add what it adds (a BOS, for some models;
                nothing, for others). False for the text of a chat template, which writes its own.

        Returns:
            Token ids.

        Raises:
            TextError: the text is no Unicode text, or holds what the vocabulary has no token for.
        """
        try:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except Exception as error:  # tokenizers raises Exception itself; for a lone surrogate, a TypeError
            raise TextError(f"the tokenizer of {self.folder} can't encode {text[:40]!r}: {error}") from error

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Turn token ids into text; bytes that are not UTF-8, and ids that stand for no token, become U+FFFD."""
        runs: list[list[int]] = [[]]
        for id in map(int, ids):
            if self.is_token(id):
                runs[-1].append(id)
            else:
                runs.append([])
        return REPLACEMENT.join(self._tokenizer.decode(run, skip_special_tokens=skip_special_tokens) for run in runs)

    def is_token(self, id: int) -> bool:
        """Whether the id stands for a token: a model's logits may have more rows than its tokenizer has tokens.

        tokenizers itself would drop such an id without a word.
        """
        return 0 <= id < 2**32 and self._tokenizer.id_to_token(id) is not None

    def is_skipped(self, id: int) -> bool:
        """Whether `decode` leaves this id out when it skips special tokens."""
        return id in self._skipped_ids

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """Write messages as the model's chat template does. Encode the result with `add_special_tokens=False`.

        Args:
            messages: such as [{"role": "user", "content": "Hello"}].
            add_generation_prompt: end where the assistant's answer begins.
            tools: JSON schemas of functions that the model may call.
            variables: what else the template reads, such as enable_thinking=False.

        Returns:
            The prompt.

        Raises:
            TextError: the folder has no chat template, the template is not valid, or it refuses the messages.
        """
        if self.chat_template is None:
            raise TextError(
                f"{self.folder} has no chat template: "
                "there is no chat_template.jinja, and no chat_template in tokenizer_config.json"
            )
        given = {"messages": messages, "tools": tools, "documents": None}
        given |= self.special_tokens | {"add_generation_prompt": add_generation_prompt} | variables
        try:
            return _template_environment().from_string(self.chat_template).render(given)
        except Exception as error:  # a template is a program: anything can go wrong in one
            raise TextError(f"chat template of {self.folder}: {error}") from error

    def _find_eos_ids(self) -> tuple[int, ...]:
        for name in ("generation_config.json", "config.json"):
            config = _read_json(self.folder / name)
            text_config = config.get("text_config") or {}
            for found in (config.get("eos_token_id"), text_config.get("eos_token_id")):
                if found is not None:
                    return _as_ids(found, self.folder / name)
        token = self.special_tokens.get("eos_token")
        if token is None:
            return ()
        id = self._tokenizer.token_to_id(token)
        if id is None:
            raise TextError(f"eos_token {token!r} of {self.folder} is not in the vocabulary of tokenizer.json")
        return (id,)


class StreamDecoder:
    """Text of a growing list of token ids, as early as it is certain.

    Text is certain once no later token can change it: a UTF-8 character is never split. Bytes that turn out not to be
    UTF-8 come out as U+FFFD, at the latest in `flush`. The pieces join to `Tokenizer.decode` of all ids. (One
    exception: a tokenizer with byte fallback writes a whole run of bytes as U+FFFD if one of them is wrong; here,
    characters that came out before the wrong byte stay as they are.)

    A token costs O(1): only the tokens since the last character boundary, and the few before it, which a decoder may
    need to know whether a word begins, are decoded again.

    Source: the prefix-offset detokenizers of text-generation-inference and vLLM (`detokenize_incrementally`).
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        """Begin at the first generated token. `skip_special_tokens` is as in `Tokenizer.decode`."""
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._window: list[int] = []  # ids that are decoded again with the next one; begins at a character boundary
        self._context = 0  # so many of them, the first, are only context: all their text has been given out
        self._given = ""  # the window's text as far as it has been given out

    def push(self, id: int) -> str:
        """Add one token id.

        Returns:
            The text that has become certain; often "" within a character. U+FFFD for an id that stands for no token.
        """
        id = int(id)
        if not self._tokenizer.is_token(id):
            return self.flush() + REPLACEMENT
        if self._skip_special_tokens and self._tokenizer.is_skipped(id):
            return ""  # it would hide the character boundaries around it
        self._window.append(id)
        text = self._decode(self._window)
        unfinished = min(UNFINISHED_CHARS, len(text) - len(text.rstrip(REPLACEMENT)))
        certain = text[: len(text) - unfinished]
        if not certain.startswith(self._given):
            certain = self._given  # an unfinished run of fallback bytes has turned its right ones into U+FFFD too
        piece, self._given = certain[len(self._given) :], certain
        if certain == text:
            self._window, self._context = self._window[self._context :], len(self._window) - self._context
            self._given = self._decode(self._window)
        elif len(self._window) - self._context > WINDOW_TOKENS:
            self._shorten(text)
        return piece

    def flush(self) -> str:
        """End the text: returns what was still held back, and starts anew."""
        text = self._decode(self._window)
        if not text.startswith(self._given):  # as in push: the context's bytes were right, the ones after it are not
            text = self._decode(self._window[: self._context]) + self._decode(self._window[self._context :])
        piece = text[len(self._given) :]
        self._window, self._context, self._given = [], 0, ""
        return piece

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special_tokens)

    def _shorten(self, text: str) -> None:
        """Cut a window that ends in a run of wrong bytes, which would otherwise grow with it.

        The cut is where the two sides decode apart to what they decode to together. Then it is at a character
        boundary: within an unfinished character it would leave more than one U+FFFD where there was one. Where there
        is no such cut, a run of fallback bytes has reached back into the context, and the context goes.
        """
        for cut in range(len(self._window) - 1, 0, -1):
            before = self._decode(self._window[:cut])
            if self._given.startswith(before) and before + self._decode(self._window[cut:]) == text:
                break
        else:
            cut, before = self._context, self._decode(self._window[: self._context])
        self._window, self._context, self._given = self._window[cut:], 0, self._given[len(before) :]


class StopStrings:
    """Cut a stream of text before the first stop string in it.

    The first is the one that is complete first; of several complete at the same character, the longest. So the result
    does not depend on how the text was split into pieces.

    Attributes:
        matched: the stop string that ended the text, or None.
    """

    def __init__(self, stops: Sequence[str]):
        """Begin a stream.

        Args:
            stops: stop strings; none of them empty.

        Raises:
            TextError: `stops` is one string rather than a sequence of them, or one of them is empty.
        """
        if isinstance(stops, str):
            raise TextError(f"stop strings must be a sequence of strings, got the string {stops!r}")
        if "" in stops:
            raise TextError("a stop string is empty: it would stop every text at its beginning")
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> tuple[str, bool]:
        """Add a piece of text.

        Returns:
            (what may be shown now, whether a stop string was found). An end of the text that may be the beginning of a
            stop string is held back. After a stop, every push gives ("", True).
        """
        if self.matched is not None:
            return "", True
        text = self._held + text
        found = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in self._stops if stop in text]
        if found:
            _, start, self.matched = min(found)
            self._held = ""
            return text[:start], True
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False

    def flush(self) -> str:
        """End the text: returns what was held back, "" after a stop."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def _read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise TextError(f"there is no {path}")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises Exception itself for a damaged file
        raise TextError(f"{path} is damaged: {error}") from error
    # A tokenizer.json may carry the settings of its training: it would cut long prompts and say nothing.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is no such file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TextError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise TextError(f"{path} is damaged: expected an object, got {type(found).__name__}")
    return found


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Texts of the special tokens, each given as a string or as {"content": string}."""
    named = {name: config[name] for name in SPECIAL_TOKENS if config.get(name) is not None}
    texts = {}
    for name, token in named.items():
        text = token.get("content") if isinstance(token, dict) else token
        if not isinstance(text, str):
            raise TextError(f"{name} of the tokenizer's configuration is {token!r}; expected a string")
        texts[name] = text
    return texts


def _read_chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except ValueError as error:
            raise TextError(f"{path} is damaged: {error}") from error
    path, template = folder / "tokenizer_config.json", config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        if "default" not in named:
            raise TextError(f"{path} has chat templates {list(named)}, but none named 'default'")
        template = named["default"]
    if template is not None and not isinstance(template, str):
        raise TextError(f"{path} is damaged: chat_template is of type {type(template).__name__}")
    return template


def _as_ids(found: Any, path: Path) -> tuple[int, ...]:
    ids = found if isinstance(found, list) else [found]
    if not all(type(id) is int for id in ids):
        raise TextError(f"{path}: eos_token_id is {found!r}; expected an integer or a list of integers")
    return tuple(ids)


def _template_environment() -> ImmutableSandboxedEnvironment:
    """Jinja as Hugging Face templates expect it, and sandboxed, because they are code.

    Source: transformers, utils/chat_template_utils.py.
    """
    extensions = [jinja2.ext.loopcontrols, _GenerationTag]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    # Jinja's own filter escapes HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}`, which marks the assistant's tokens for training; here it stands for what it encloses."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
