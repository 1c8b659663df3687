"""Text to token ids and back: byte-level BPE from a GGUF file or from `tokenizer.json`.

Encoding is the `tokenizers` library's. Two things are done here because the library does them in a
way that loses text: a byte that the vocabulary lacks is an error (the library drops it silently),
and decoding joins bytes before it reads them as UTF-8.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import numpy as np
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from .errors import UserError
from .json_files import read_json

Message = Mapping[str, Any]

_CONTROL, _USER_DEFINED = 3, 4  # token types in GGUF files


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's table: the printable character that stands for each byte, to the byte.

    Bytes that are printable in Latin-1 stand for themselves; the others are counted from U+0100.
    """
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(own)]
    table = {chr(byte): byte for byte in own}
    table.update({chr(0x100 + n): byte for n, byte in enumerate(others)})
    return table


_BYTE_OF = _byte_alphabet()
_CHARACTER_OF = {byte: character for character, byte in _BYTE_OF.items()}


def _smollm(core: tokenizers.Tokenizer) -> None:
    """Digits one by one, then GPT-2's byte-level pattern."""
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def _gpt2(core: tokenizers.Tokenizer) -> None:
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _split(core: tokenizers.Tokenizer, digits: str) -> None:
    """The pattern of GPT-4's line of tokenizers: line ends by themselves, `digits` at a time."""
    pattern = (
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _qwen2(core: tokenizers.Tokenizer) -> None:
    """Text in NFC, digits one by one."""
    core.normalizer = normalizers.NFC()
    _split(core, r"\p{N}")


def _llama3(core: tokenizers.Tokenizer) -> None:
    """Digits by threes; a piece that is a token as a whole is that token, whatever the merges."""
    core.model.ignore_merges = True
    _split(core, r"\p{N}{1,3}")


# What the names of pre-tokenizers in GGUF files (`tokenizer.ggml.pre`) stand for.
_PRE_TOKENIZERS: dict[str, Callable[[tokenizers.Tokenizer], None]] = {
    "smollm": _smollm,
    "gpt-2": _gpt2,
    "olmo": _gpt2,
    "qwen2": _qwen2,
    "llama-bpe": _llama3,
}
# Those whose files mean `tokenizer.ggml.add_bos_token` true where they do not name it.
_ADD_BOS = ("llama-bpe",)


PIECE = 1 << 20
"""Characters that are encoded at a time."""
_BETWEEN_WORDS = re.compile(r"(?<=[A-Za-z]) (?=[A-Za-z])")
"""Where pre-tokenizers of byte-level vocabularies cut, whatever stands further away; that this one
does is looked at."""
_AROUND = 64


class Tokenizer:
    """Encodes, decodes and renders chats.

    `adds_bos` says that the model expects `bos_id` at the start of a document; `encode` never adds
    it. `special` maps the content of each control token to its id. Encoding is safe from several
    threads.
    """

    def __init__(
        self,
        core: tokenizers.Tokenizer,
        *,
        bos_id: int | None = None,
        eos_ids: Sequence[int] = (),
        pad_id: int | None = None,
        unk_id: int | None = None,
        adds_bos: bool = False,
        chat_template: str | None = None,
    ) -> None:
        self._core = core
        self.vocab_size: int = core.get_vocab_size(with_added_tokens=True)
        self.bos_id, self.pad_id, self.unk_id = bos_id, pad_id, unk_id
        self.eos_ids: tuple[int, ...] = tuple(eos_ids)
        self.adds_bos = adds_bos
        self.chat_template = chat_template
        added = core.get_added_tokens_decoder()
        self.special: dict[str, int] = {t.content: n for n, t in added.items() if t.special}
        self._added: dict[int, str] = {n: t.content for n, t in added.items()}
        layout = json.loads(core.to_str())
        self._layout: dict[str, Any] = layout
        steps = json.dumps([layout.get("pre_tokenizer"), layout.get("normalizer")])
        self._is_byte_level = layout["model"]["type"] == "BPE" and '"ByteLevel"' in steps
        self._missing = self._missing_bytes() if self._is_byte_level else b""

    # ------------------------------------------------------------------ text to ids

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of `text`.

        With `special`, control tokens written in the text (`<|im_end|>`) become their ids; without,
        they are ordinary characters, as text from outside should be. Raises `UserError` for a byte
        that the vocabulary has no token for, named with its position.
        """
        self._check_bytes(text)
        core = self._core if special else self._plain
        ids: list[int] = core.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str], special: bool = True) -> list[list[int]]:
        """`encode` of every text, several at a time."""
        for text in texts:
            self._check_bytes(text)
        core = self._core if special else self._plain
        return [e.ids for e in core.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_long(self, text: str, special: bool = False) -> NDArray[np.int32]:
        """`encode` of a text of any length, int32 [tokens]: a piece at a time, because the library
        takes some hundred bytes a character. It is cut between words, where no token goes on."""
        self._check_bytes(text)
        core = self._core if special else self._plain
        found = []
        start = 0
        while start < len(text):
            end = self._cut(text, start + PIECE)
            # A batch of one: the library encodes it without holding the interpreter's lock.
            ids = core.encode_batch_fast([text[start:end]], add_special_tokens=False)[0].ids
            found.append(np.array(ids, dtype=np.int32))
            start = end
        return np.concatenate([np.empty(0, np.int32), *found])

    def _cut(self, text: str, start: int) -> int:
        """The first place from `start` on where the text can be cut, or its end."""
        for place in _BETWEEN_WORDS.finditer(text, start):
            at = place.start()
            before, behind = text[max(0, at - _AROUND) : at], text[at : at + _AROUND]
            apart = [*self._plain_ids(before), *self._plain_ids(behind)]
            if self._plain_ids(before + behind) == apart:
                return at
        return len(text)

    def _plain_ids(self, text: str) -> list[int]:
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        return ids

    def encode_prompt(self, text: str) -> list[int]:
        """`encode` of the beginning of a document: behind `bos_id` if the model expects it and the
        text does not begin with it."""
        ids = self.encode(text)
        if not self.adds_bos or self.bos_id is None or ids[:1] == [self.bos_id]:
            return ids
        return [self.bos_id, *ids]

    @property
    def start_id(self) -> int:
        """The token that an empty prompt consists of: the beginning- or end-of-text token; raises
        UserError if there is neither."""
        if self.bos_id is not None:
            return self.bos_id
        if not self.eos_ids:
            raise UserError("an empty prompt needs a beginning- or end-of-text token")
        return self.eos_ids[0]

    def tokens_inside(
        self, text: str, spans: Sequence[tuple[int, int]], special: bool = True
    ) -> NDArray[np.bool_]:
        """Which of the tokens of `text` lie wholly inside one of the spans of characters [from,
        to), bool [tokens]. The spans do not overlap and rise."""
        core = self._core if special else self._plain
        offsets = core.encode(text, add_special_tokens=False).offsets
        places = np.array(offsets, dtype=np.int64).reshape(-1, 2)
        inside = np.zeros(len(places), dtype=np.bool_)
        for start, end in spans:
            inside |= (places[:, 0] >= start) & (places[:, 1] <= end)
        return inside

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The same tokenizer without control tokens: what encodes text as mere characters."""
        layout = dict(self._layout)
        layout["added_tokens"] = [t for t in layout["added_tokens"] if not t["special"]]
        layout["post_processor"] = None  # may name tokens that are gone; it is never used
        return tokenizers.Tokenizer.from_str(json.dumps(layout))

    def _missing_bytes(self) -> bytes:
        vocabulary = self._layout["model"]["vocab"]
        return bytes(b for b in range(256) if _CHARACTER_OF[b] not in vocabulary)

    def _check_bytes(self, text: str) -> None:
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as error:
            code = ord(text[error.start])
            raise UserError(
                f"text holds the lone surrogate U+{code:04X} at character {error.start}; "
                "it is no valid text"
            ) from None
        if self._missing and len(data.translate(None, self._missing)) != len(data):
            self._refuse_byte(text)

    def _refuse_byte(self, text: str) -> NoReturn:
        for position, character in enumerate(text):
            for byte in character.encode("utf-8"):
                if byte in self._missing:
                    raise UserError(
                        f"the vocabulary has no token for byte 0x{byte:02x} "
                        f"(character U+{ord(character):04X} at position {position}); remove it"
                    )
        raise AssertionError("called for a text without a missing byte")

    # ------------------------------------------------------------------ ids to text

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of `ids`; bytes that are not valid UTF-8 (a cut character) become U+FFFD.

        `skip_special` leaves control tokens out. Raises `UserError` for an id out of range.
        """
        wanted = [int(token) for token in ids]
        if self._is_byte_level:
            return self.decode_bytes(wanted, skip_special).decode("utf-8", errors="replace")
        for token in wanted:
            if not 0 <= token < self.vocab_size:
                self._refuse_id(token)
        text: str = self._core.decode(wanted, skip_special_tokens=skip_special)
        return text

    def decode_bytes(self, ids: Iterable[int], skip_special: bool = False) -> bytes:
        """The bytes that `ids` stand for (byte-level vocabularies), for output as it is made."""
        table, hidden = self._bytes_of, set(self.special.values()) if skip_special else set()
        parts: list[bytes] = []
        for token in ids:
            piece = table.get(int(token))
            if piece is None:
                self._refuse_id(int(token))
            if token not in hidden:
                parts.append(piece)
        return b"".join(parts)

    @cached_property
    def _bytes_of(self) -> dict[int, bytes]:
        table: dict[int, bytes] = {}
        for piece, token in self._layout["model"]["vocab"].items():
            known = [_BYTE_OF.get(character) for character in piece]
            table[token] = (
                piece.encode("utf-8") if None in known else bytes(b for b in known if b is not None)
            )
        for token, content in self._added.items():
            table[token] = content.encode("utf-8")
        return table

    def _refuse_id(self, token: int) -> NoReturn:
        raise UserError(f"token id {token} is outside the vocabulary of {self.vocab_size}")

    def token_text(self, token: int | None) -> str | None:
        """The content of one token as the vocabulary spells it; None for None."""
        if token is None:
            return None
        piece: str | None = self._core.id_to_token(token)
        if piece is None:
            self._refuse_id(token)
        return piece

    # ------------------------------------------------------------------ chats

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Any] | None = None,
    ) -> str:
        """Render `messages` (each with `role` and `content`, a string or parts of type text; beside
        tool calls it may be missing) and `tools` with the model's own template.

        Encode the result with `special=True`. The template runs in a sandbox. Raises `UserError`
        if there is no template, if it refuses the messages, or if it would leave out tools or calls
        of them.
        """
        if self.chat_template is None:
            raise UserError("this model has no chat template; use a plain prompt")
        given = [self._message(n, message) for n, message in enumerate(messages)]
        if tools and "tools" not in self.chat_template:
            raise UserError("tools: the chat template has no place for them")
        try:
            return self._template.render(
                messages=given,
                tools=tools or None,
                add_generation_prompt=add_generation_prompt,
                bos_token=self.token_text(self.bos_id) or "",
                eos_token=self.token_text(self.eos_ids[0]) if self.eos_ids else "",
                pad_token=self.token_text(self.pad_id) or "",
                unk_token=self.token_text(self.unk_id) or "",
            )
        except (
            jinja2.TemplateError,
            ArithmeticError,
            AttributeError,
            LookupError,
            TypeError,
            ValueError,
        ) as error:
            raise UserError(f"chat template: {error}") from None

    def _message(self, number: int, message: Message) -> dict[str, Any]:
        """A message as templates expect it: many write any `content` as Python spells it."""
        where = f"messages[{number}]"
        if not isinstance(message, Mapping) or "role" not in message:
            raise UserError(f"{where}: needs the keys role and content")
        content, calls = message.get("content"), message.get("tool_calls")
        if calls and "tool_calls" not in (self.chat_template or ""):
            raise UserError(f"{where}: the chat template has no place for tool_calls")
        if content is None and calls:
            content = ""
        elif "content" not in message:
            raise UserError(f"{where}: needs the keys role and content")
        if isinstance(content, list) and content and all(map(_is_text_part, content)):
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str):
            raise UserError(f"{where}.content: expected a string or parts of type text")
        return {**message, "content": content}

    @cached_property
    def _template(self) -> jinja2.Template:
        # The settings with which Hugging Face renders the same templates.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise_from_template
        environment.globals["strftime_now"] = _now
        environment.filters["tojson"] = _to_json
        return environment.from_string(self.chat_template or "")

    # ------------------------------------------------------------------ files

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of everything that decides which ids a text gets (the chat template does not)."""
        layout = {k: v for k, v in self._layout.items() if k not in ("truncation", "padding")}
        text = json.dumps(layout, sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode("ascii")).hexdigest()

    def save(self, directory: Path | str) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json` (with the chat template)."""
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "add_bos_token": self.adds_bos,
            "bos_token": self.token_text(self.bos_id),
            "eos_token": self.token_text(self.eos_ids[0]) if self.eos_ids else None,
            "pad_token": self.token_text(self.pad_id),
            "unk_token": self.token_text(self.unk_id),
        }
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        folder = Path(directory)
        (folder / "tokenizer.json").write_text(self._core.to_str(pretty=True), encoding="utf-8")
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")

    @classmethod
    def from_directory(
        cls, directory: Path | str, eos_ids: Sequence[int] | None = None
    ) -> Tokenizer:
        """Read `tokenizer.json` and `tokenizer_config.json` of a model directory.

        `eos_ids` are the model's own end tokens where they are known (they may be several); by
        default the one of `tokenizer_config.json`. Raises `UserError` naming the file.
        """
        folder = Path(directory)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"{folder}: tokenizer.json is missing")
        try:
            core = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"{path}: not a valid tokenizer ({error})") from None
        core.no_truncation()
        core.no_padding()
        told = folder / "tokenizer_config.json"
        settings = read_json(told) if told.is_file() else {}
        token_ids = {
            key: _token_id(core, settings.get(f"{key}_token"), folder)
            for key in ("bos", "eos", "pad", "unk")
        }
        if eos_ids is None:
            eos_ids = [] if token_ids["eos"] is None else [token_ids["eos"]]
        post = json.loads(core.to_str()).get("post_processor")
        bos = token_ids["bos"]
        adds_bos = settings.get("add_bos_token")
        if adds_bos is None:
            # Files without the switch say it in the post-processor: it names the token.
            name = None if bos is None else core.id_to_token(bos)
            adds_bos = name is not None and json.dumps(name) in json.dumps(post)
        return cls(
            core,
            bos_id=bos,
            eos_ids=eos_ids,
            pad_id=token_ids["pad"],
            unk_id=token_ids["unk"],
            adds_bos=bool(adds_bos),
            chat_template=_chat_template(folder, settings),
        )

    @classmethod
    def from_gguf_fields(cls, fields: Mapping[str, Any], where: str = "GGUF") -> Tokenizer:
        """Rebuild the byte-level BPE that a GGUF header describes.

        `fields` are the header's keys and plain Python values. Raises `UserError`, opened by
        `where`, for another kind of tokenizer or an unknown pre-tokenizer (named).
        """
        kind = fields.get("tokenizer.ggml.model")
        if kind != "gpt2":
            raise UserError(f"{where}: tokenizer.ggml.model {kind!r} is not supported; only 'gpt2'")
        pre = fields.get("tokenizer.ggml.pre")
        if not isinstance(pre, str) or pre not in _PRE_TOKENIZERS:
            raise UserError(
                f"{where}: tokenizer.ggml.pre {pre!r} is not supported; "
                f"supported: {', '.join(_PRE_TOKENIZERS)}"
            )
        pieces, types, merges = _gguf_lists(fields, where)
        vocabulary = {piece: token for token, piece in enumerate(pieces)}
        if len(vocabulary) != len(pieces):
            raise UserError(f"{where}: tokenizer.ggml.tokens holds a token twice")
        try:
            model = models.BPE(vocab=vocabulary, merges=merges)
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"{where}: tokenizer.ggml.merges: {error}") from None
        core = tokenizers.Tokenizer(model)
        _PRE_TOKENIZERS[pre](core)
        core.decoder = decoders.ByteLevel()
        for piece, sort in zip(pieces, types, strict=True):
            if sort == _CONTROL:
                core.add_special_tokens([AddedToken(piece, special=True, normalized=False)])
            elif sort == _USER_DEFINED:
                core.add_tokens([AddedToken(piece, special=False, normalized=False)])
        return cls(
            core,
            bos_id=_gguf_id(fields, "bos", len(pieces), where),
            eos_ids=gguf_eos_ids(fields, len(pieces), where),
            pad_id=_gguf_id(fields, "padding", len(pieces), where),
            unk_id=_gguf_id(fields, "unknown", len(pieces), where),
            adds_bos=bool(fields.get("tokenizer.ggml.add_bos_token", pre in _ADD_BOS)),
            chat_template=fields.get("tokenizer.chat_template"),
        )


def gguf_eos_ids(fields: Mapping[str, Any], vocab_size: int, where: str) -> list[int]:
    """The ids that end a generation: end of sequence, then end of turn and of message if given."""
    found = [_gguf_id(fields, key, vocab_size, where) for key in ("eos", "eot", "eom")]
    return list(dict.fromkeys(token for token in found if token is not None))


def _gguf_id(fields: Mapping[str, Any], key: str, vocab_size: int, where: str) -> int | None:
    name = f"tokenizer.ggml.{key}_token_id"
    token = fields.get(name)
    if token is None:
        return None
    if not isinstance(token, int) or not 0 <= token < vocab_size:
        raise UserError(f"{where}: {name} {token!r} is outside the vocabulary of {vocab_size}")
    return token


def _gguf_lists(
    fields: Mapping[str, Any], where: str
) -> tuple[list[str], list[int], list[tuple[str, str]]]:
    found: dict[str, list[Any]] = {}
    for key, kind in (("tokens", str), ("token_type", int), ("merges", str)):
        value = fields.get(f"tokenizer.ggml.{key}")
        if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
            raise UserError(f"{where}: tokenizer.ggml.{key} is missing or of the wrong type")
        found[key] = value
    if len(found["tokens"]) != len(found["token_type"]):
        raise UserError(
            f"{where}: tokenizer.ggml.token_type has {len(found['token_type'])} entries "
            f"for {len(found['tokens'])} tokens"
        )
    merges: list[tuple[str, str]] = []
    for merge in found["merges"]:
        left, _, right = merge.partition(" ")
        merges.append((left, right))
    return found["tokens"], found["token_type"], merges


def _token_id(core: tokenizers.Tokenizer, named: Any, folder: Path) -> int | None:
    content = named.get("content") if isinstance(named, dict) else named
    if content is None:
        return None
    token: int | None = core.token_to_id(content) if isinstance(content, str) else None
    if token is None:
        raise UserError(
            f"{folder / 'tokenizer_config.json'}: token {content!r} is not in tokenizer.json"
        )
    return token


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several named templates
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise UserError(f"{folder / 'tokenizer_config.json'}: chat_template must be a string")
    return template


def _is_text_part(part: Any) -> bool:
    return (
        isinstance(part, Mapping)
        and part.get("type") == "text"
        and isinstance(part.get("text"), str)
    )


def _raise_from_template(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _to_json(value: Any, indent: int | None = None, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
