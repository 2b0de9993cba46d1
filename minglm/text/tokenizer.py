"""Text to token ids and back: GLM-4.5's byte-level BPE, loaded from a folder or trained on our own text.

The merging itself is done by the `tokenizers` library. This file adds what the library leaves open: GLM's
added tokens and their order, text that must not be read as tags, readable names for single ids, and decoding
one id at a time.
"""

from __future__ import annotations

import codecs
import json
import operator
import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minglm.formats.files import write_text

if TYPE_CHECKING:
    import tokenizers

# GLM-4.5's 36 added tokens in the order of their ids. They follow the base vocabulary: the first one has
# the id 151329 in GLM-4.5 and `vocab_size - 36` in a tokenizer trained below.
ADDED_TOKENS = (
    *("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
    *("<|begin_of_audio|>", "<|end_of_audio|>", "<|begin_of_transcription|>", "<|end_of_transcription|>"),
    *("<|code_prefix|>", "<|code_middle|>", "<|code_suffix|>", "<think>", "</think>"),
    *("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
    *("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "/nothink"),
    *("<|begin_of_box|>", "<|end_of_box|>", "<|image|>", "<|video|>"),
)
NUM_SPECIAL = 18  # decode(skip_special=True) drops the first 18, and keeps the think and tool tags after them
# The model ends an answer with any one of these.
END_TOKENS = ("<|endoftext|>", "<|user|>", "<|observation|>")

# How GLM cuts text into pieces before merging; a merge never crosses a cut. {digits}: most digits in a piece.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,{digits}}}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """A byte-level BPE tokenizer: `load` one, or make one with `train_tokenizer`."""

    def __init__(self, library: tokenizers.Tokenizer, config: dict[str, Any] | None = None):
        """Wrap a tokenizer of the `tokenizers` library; `config` is the content of tokenizer_config.json."""
        self.library = library
        self.config = config or {}
        self._added = {i: token.content for i, token in library.get_added_tokens_decoder().items()}

    @staticmethod
    def load(folder: str | Path) -> Tokenizer:
        """Read `tokenizer.json` of a checkpoint folder, and `tokenizer_config.json` if there is one.

        ValueError if the file is missing, damaged, or not byte-level BPE.
        """
        import tokenizers

        path = Path(folder) / "tokenizer.json"
        text = _read(path)
        try:
            library = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is not a tokenizer ({error}). {_COPY_AGAIN}") from error
        _require_byte_level(path, text)
        library.no_truncation()  # left over from training; transformers does not obey them either
        library.no_padding()
        config_path = path.with_name("tokenizer_config.json")
        return Tokenizer(library, _read_json(config_path) if config_path.exists() else {})

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, which transformers loads with the same ids."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "tokenizer.json", self.library.to_str(pretty=True))
        write_text(folder / "tokenizer_config.json", json.dumps(self.config, ensure_ascii=False, indent=2) + "\n")

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Text to ids [T]. No token is put in front: `[gMASK]<sop>` is the chat template's work.

        `special=True` turns the text of an added token, such as `<|user|>`, into its id. `special=False`
        reads it as ordinary characters, so text from outside cannot open a turn or a tool call.
        """
        library = self.library if special else self._without_added
        try:
            ids = library.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeError) as error:
            raise ValueError(f"cannot encode {text!r:.80}: wanted a str without lone surrogates") from error
        if not special and not self._added.keys().isdisjoint(ids):
            raise ValueError("the base vocabulary holds an added token too, so special=False cannot keep it out")
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Ids [T] to text. Bytes that are not UTF-8 become U+FFFD; `skip_special` drops `special_ids`."""
        return self.library.decode([self._known(i) for i in ids], skip_special_tokens=skip_special)

    def stream(self, skip_special: bool = False) -> StreamDecoder:
        """A decoder that is fed one id at a time."""
        return StreamDecoder(self, skip_special)

    def token_bytes(self, id: int) -> bytes:
        """The bytes that an id stands for; a character may be spread over several ids."""
        id = self._known(id)
        if id in self._added:
            return self._added[id].encode()
        byte_of = _byte_alphabet()
        return bytes(byte_of[letter] for letter in self.library.id_to_token(id) or "")

    def token(self, id: int) -> str:
        """Readable text of one id, for tables: ␣ is a space, ↵ a newline, <0xE4> part of a character."""
        return _visible(self.token_bytes(id))

    def id(self, token: str) -> int:
        """The id of a token, given as its text (" the") or as `token` shows it ("␣the")."""
        letter_of = {byte: letter for letter, byte in _byte_alphabet().items()}
        found = self.library.token_to_id("".join(letter_of[byte] for byte in token.encode()))
        if found is None:
            found = self._id_of_shown.get(token)
        if found is None:
            near = ", ".join(map(repr, get_close_matches(token, self._id_of_shown, n=5))) or "none"
            raise ValueError(f"no token {token!r} among {len(self)}; near matches: {near}. encode() splits any text")
        return found

    def __len__(self) -> int:
        """Number of ids, added tokens included. A model may have more rows; those above are never used."""
        return self.library.get_vocab_size(with_added_tokens=True)

    def __repr__(self) -> str:
        return f"Tokenizer({len(self)} ids, {len(self._added)} of them added tokens)"

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that decode(skip_special=True) drops. In GLM the think and tool tags are not among them."""
        return frozenset(i for i, token in self.library.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def digits(self) -> int | None:
        """How many digits a piece may hold; None if text is not cut as GLM does."""
        steps = (json.loads(self.library.to_str())["pre_tokenizer"] or {}).get("pretokenizers") or [{}]
        pattern = (steps[0].get("pattern") or {}).get("Regex")
        return next((n for n in range(1, 10) if pattern == _SPLIT.format(digits=n)), None)

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: all of them count, not only the first. Empty if the vocabulary has none."""
        found = (self.library.token_to_id(token) for token in END_TOKENS)
        return tuple(i for i in found if i is not None)

    @cached_property
    def _without_added(self) -> tokenizers.Tokenizer:
        # The library's own switch, encode_special_tokens, still matches added tokens not marked special:
        # <think> and <tool_call> would get through. A twin that does not know any added token is certain.
        import tokenizers

        content = json.loads(self.library.to_str())
        return tokenizers.Tokenizer.from_str(json.dumps(content | {"added_tokens": []}))

    @cached_property
    def _id_of_shown(self) -> dict[str, int]:
        return {self.token(i): i for i in self.library.get_vocab(with_added_tokens=True).values()}

    def _known(self, id: int) -> int:
        try:
            id = operator.index(id)
        except TypeError:
            raise ValueError(f"an id is {type(id).__name__}; wanted ints, a flat list or array [T]") from None
        if id < 0 or self.library.id_to_token(id) is None:
            raise ValueError(f"id {id} is not in the vocabulary; ids run from 0 to {len(self) - 1}")
        return id


class StreamDecoder:
    """Turns ids into text one at a time, in constant time per id.

    Bytes of an unfinished character wait inside, so no piece ends in half a character. All pieces together,
    with `finish()`, are `decode(ids)`.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = False):
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, id: int) -> str:
        """The text that this id completes; empty while a character is unfinished."""
        return "" if id in self._skip else self._utf8.decode(self._tokenizer.token_bytes(id))

    def finish(self) -> str:
        """End of the ids: U+FFFD if a character is unfinished, else nothing. Then ready for the next text."""
        return self._utf8.decode(b"", final=True)


def train_tokenizer(texts: Iterable[str], vocab_size: int, digits: int = 1) -> Tokenizer:
    """Learn a byte-level BPE vocabulary of exactly `vocab_size` ids, the last 36 being GLM's added tokens.

    As GLM-4.5's, but a piece holds at most `digits` digits: 1 gives every digit its own token, so place value
    can be read off positions; 3 is GLM's choice. All 256 bytes are in the vocabulary, so every text can be
    encoded. The same texts in the same order give the same file. ValueError if the texts have too few pairs
    to learn so many tokens.
    """
    base_size = vocab_size - len(ADDED_TOKENS)
    if base_size < 256:
        raise ValueError(
            f"vocab_size is {vocab_size}; the smallest is {256 + len(ADDED_TOKENS)}: 256 bytes and 36 tags; "
            "take a model with a larger vocabulary, such as glm-nano"
        )
    if digits < 1:
        raise ValueError(f"digits is {digits}; wanted 1 (a token per digit) to 3 (as GLM-4.5) or more")
    if isinstance(texts, str):
        raise ValueError("texts is one str; wanted an iterable of them. Try [text]")
    library = _train_base(texts, base_size, digits)
    learned = library.get_vocab_size()
    if learned != base_size:
        fits = learned + len(ADDED_TOKENS)
        raise ValueError(f"the texts fill only {fits} of {vocab_size} ids; give more text or vocab_size={fits}")
    _append_added_tokens(library)
    return Tokenizer(library, _trained_config())


def _train_base(texts: Iterable[str], base_size: int, digits: int) -> tokenizers.Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE(ignore_merges=True))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(_SPLIT.format(digits=digits)), behavior="isolated")
    library.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=base_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    library.train_from_iterator(_between_added_tokens(texts), trainer)
    return library


def _between_added_tokens(texts: Iterable[str]) -> Iterator[str]:
    # Added tokens never reach the merges, so nothing is learned from them. This also keeps "/nothink", which
    # is a single piece, out of the base vocabulary, where it would take the place of the added token.
    added = re.compile("|".join(map(re.escape, ADDED_TOKENS)))
    for text in texts:
        yield from added.split(text)


def _append_added_tokens(library: tokenizers.Tokenizer) -> None:
    from tokenizers import AddedToken

    tokens = [AddedToken(token, normalized=False) for token in ADDED_TOKENS]
    library.add_special_tokens(tokens[:NUM_SPECIAL])
    library.add_tokens(tokens[NUM_SPECIAL:])


def _trained_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "additional_special_tokens": list(ADDED_TOKENS[1:NUM_SPECIAL]),
    }


@lru_cache
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's letter for each byte: printable bytes stand for themselves, the others for U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_SHOWN = {" ": "␣", "\n": "↵", "\t": "⇥"}


def _visible(data: bytes) -> str:
    # surrogateescape turns a byte that is not UTF-8 into a code point from U+DC80 on, spelled out here
    return "".join(_visible_letter(letter) for letter in data.decode("utf-8", "surrogateescape"))


def _visible_letter(letter: str) -> str:
    if letter in _SHOWN:
        return _SHOWN[letter]
    if "\udc80" <= letter <= "\udcff":
        return f"<0x{ord(letter) - 0xDC00:02X}>"
    return letter if letter.isprintable() else f"<U+{ord(letter):04X}>"


_COPY_AGAIN = "Copy the file again from the checkpoint, or make one with train_tokenizer(...).save(folder)"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise ValueError(f"cannot read {path} ({error}). {_COPY_AGAIN}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}). {_COPY_AGAIN}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, wanted a JSON object. {_COPY_AGAIN}")
    return content


def _require_byte_level(path: Path, text: str) -> None:
    content = json.loads(text)
    model, decoder = content["model"].get("type"), (content.get("decoder") or {}).get("type")
    if (model, decoder) != ("BPE", "ByteLevel"):
        raise ValueError(f"{path} is {model} with decoder {decoder}; minglm reads byte-level BPE, as GLM-4.5 uses")
