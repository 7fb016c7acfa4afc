"""Continue texts with an engine: encode, check, ask for ids, decode."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, Unpack, cast, overload

from ascendspeed_core.config.load import validate
from ascendspeed_data.command_line import log
from ascendspeed_data.errors import AscendSpeedError, ConfigError, DataError, did_you_mean
from ascendspeed_data.literal_pieces import LiteralTokenizer
from ascendspeed_data.tokenizer import Tokenizer
from ascendspeed_infer.beams import BeamSettings
from ascendspeed_infer.config import SamplingConfig
from ascendspeed_infer.detokenizer import Detokenizer
from ascendspeed_infer.engine.llm_engine import check_length
from ascendspeed_infer.engine.sequence import CompletionOutput, GenerationSettings, StopCheck, never_stop
from ascendspeed_infer.engines import TextEngine, TokenRequest, check_sampling
from ascendspeed_infer.legacy_options import rename_legacy_options
from ascendspeed_infer.requests import Completion, GenerateOptions, Prompts, StreamedText
from ascendspeed_infer.sampling import SamplingParams


class TextGenerator:
    """Continue texts with any engine.

    Args:
        tokenizer: of the model.
        engine: continues ids.
    """

    is_main_process = True
    """Whether this process logs; an engine that starts processes of its own is one process here."""

    def __init__(self, tokenizer: Tokenizer, engine: TextEngine) -> None:
        self.tokenizer, self.engine = tokenizer, engine

    @overload
    def generate(
        self,
        prompts: Prompts,
        *,
        stream: Literal[False] = False,
        seeds: Sequence[int] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> list[Completion]: ...

    @overload
    def generate(
        self, prompts: Prompts, *, stream: Literal[True], **options: Unpack[GenerateOptions]
    ) -> Iterator[StreamedText]: ...

    def generate(
        self,
        prompts: Prompts,
        *,
        stream: bool = False,
        seeds: Sequence[int] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> list[Completion] | Iterator[StreamedText]:
        """Continue each prompt; under a layout of several ranks all call alike and get the same.

        Args:
            prompts: one text or several, or their ids.
            stream: yield the text as it grows, token by token; for one prompt.
            seeds: one for each prompt, in place of `seed`.
            options: the fields of `config.SamplingConfig`, each explained there, with its default.

        Returns:
            `num_return_sequences` completions of each prompt, in order; when streaming, an iterator.

        Raises:
            ConfigError: an unknown option, a value outside its range, options that contradict each other.
            AscendSpeedError: a prompt that leaves no room for the new tokens.
        """
        if not stream:
            found = self.completions(prompts, seeds=seeds, **options)
            return [one for several in found for one in several]
        if seeds is not None:
            raise ConfigError("seeds are for several prompts; give seed with stream")
        return self.stream(prompts, **options)

    def stream(
        self, prompt: Prompts, *, session: Any = None, **options: Unpack[GenerateOptions]
    ) -> Iterator[StreamedText]:
        """Continue one prompt and yield what each token adds.

        Args:
            prompt: a text or its ids.
            session: of the engine's `new_session`: what earlier prompts of it have in common with this one need not be
                computed again.
            options: as for `generate`.
        """
        config = self._checked(options)
        several = _separate(prompt)
        if len(several) != 1 or config.num_beams > 1 or config.num_return_sequences > 1:
            raise ConfigError("stream gives one text as it grows; give one prompt, and no beams")
        ids = self._encoded(several[0], config.parse_special)
        return self._stream(ids, self._settings(config, ids, config.seed), config, session)

    def completions(
        self,
        prompts: Prompts,
        *,
        seeds: Sequence[int] | None = None,
        names: Sequence[str] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Iterator[list[Completion]]:
        """Continue each prompt as `generate` does; yield the completions of each once it and those before it are ready.

        Options and prompts are checked before anything is computed; errors say which prompt is meant.

        Args:
            prompts: as for `generate`.
            seeds: as for `generate`.
            names: what errors call each prompt, such as file and line; by default `prompt 1` and so on.
            options: as for `generate`.
        """
        config = self._checked(options)
        several = _separate(prompts)
        if seeds is not None and len(seeds) != len(several):
            raise ConfigError(f"{len(seeds)} seeds were given for {len(several)} prompts; give one for each")
        if names is None:
            # One prompt needs no number.
            names = [f"prompt {number}" if len(several) > 1 else "" for number in range(1, len(several) + 1)]
        encoded, settings = [], []
        for number, (name, one) in enumerate(zip(names, several, strict=True)):
            with named_prompt(name):
                encoded.append(self._encoded(one, config.parse_special, name))
                settings.append(
                    self._settings(config, encoded[-1], config.seed if seeds is None else seeds[number])
                )
        texts = [one if isinstance(one, str) else None for one in several]
        return self._completions(texts, names, encoded, settings, config)

    def _completions(
        self,
        texts: Sequence[str | None],
        names: Sequence[str],
        encoded: Sequence[Sequence[int]],
        settings: Sequence[GenerationSettings],
        config: SamplingConfig,
    ) -> Iterator[list[Completion]]:
        requests = [self._requests(*one, config) for one in zip(encoded, settings, strict=True)]
        finished = self.engine.generate([request for several in requests for request in several], config)
        for name, text, ids, own, several in zip(names, texts, encoded, settings, requests, strict=True):
            # Ids that give ids need no tokenizer.
            prompt = text if text is not None else self.tokenizer.decode(ids) if config.detokenize else ""
            with named_prompt(name):
                found = [one for _ in several for one in next(finished)]
            if len(found) < config.num_return_sequences and self.is_main_process:
                log(
                    f"only {len(found)} of {config.num_return_sequences} texts were found: the filters leave no more"
                )
            yield [self._completion(prompt, ids, own, one, config) for one in found]

    def _requests(
        self, ids: Sequence[int], settings: GenerationSettings, config: SamplingConfig
    ) -> list[TokenRequest]:
        """Return what the engine continues for one prompt; several draws have seeds that follow."""
        prompt, stop_check = tuple(ids), self._stop_check(ids, settings)
        if config.num_beams > 1:
            beams = BeamSettings(
                config.num_beams, config.length_penalty, config.early_stopping, config.num_return_sequences
            )
            return [TokenRequest(prompt, settings, stop_check, beams)]
        sampling = settings.sampling
        seeds = range(sampling.seed, sampling.seed + config.num_return_sequences)
        return [
            TokenRequest(prompt, replace(settings, sampling=replace(sampling, seed=seed)), stop_check)
            for seed in seeds
        ]

    def _checked(self, options: GenerateOptions) -> SamplingConfig:
        given = rename_legacy_options(options)
        for name in given.keys() - SamplingConfig.model_fields.keys():
            raise ConfigError(
                f"generate has no option {name}{did_you_mean(name, SamplingConfig.model_fields)}"
            )
        config = validate(SamplingConfig, given)
        check_sampling(config, self.engine.name, self.engine.supported_options)
        if self.is_main_process:
            for line in config.ineffective_options():
                log(line)
        return config

    def _encoded(self, prompt: str | Sequence[int], parse_special: bool, name: str = "") -> list[int]:
        """Return the ids of a prompt; special pieces that a text spells are text, unless `parse_special`.

        Raises:
            AscendSpeedError: a text with half a surrogate pair, or an id that the model does not have.
        """
        if isinstance(prompt, str) and parse_special:
            check_text(prompt)
            ids, _ = self.tokenizer.encode_rendered(prompt)
            return [*self.tokenizer.prefix_ids, *ids, *self.tokenizer.suffix_ids]

        def say(pieces: str) -> None:
            if self.is_main_process:
                log(
                    f"{name or 'the prompt'} spells {pieces}, which is read as text; give --parse-special if control "
                    "is meant"
                )

        return encode_prompt(self.tokenizer, self.engine.vocab_size, prompt, say)

    def _settings(self, config: SamplingConfig, ids: Sequence[int], seed: int) -> GenerationSettings:
        if config.max_length is not None and config.max_length <= len(ids):
            raise AscendSpeedError(
                f"the prompt has {len(ids)} tokens, which leaves none of max_length={config.max_length}; "
                "shorten the prompt, or give max_new_tokens"
            )
        max_new_tokens = config.max_new_tokens if config.max_length is None else config.max_length - len(ids)
        check_length(len(ids), max_new_tokens, self.engine.max_model_len)
        eos_token_ids = () if config.ignore_eos else self.eos_token_ids()
        sampling = SamplingParams(
            config.do_sample,
            config.temperature,
            config.top_k,
            config.top_p,
            seed,
            config.repetition_penalty,
        )
        return GenerationSettings(
            max_new_tokens,
            sampling,
            config.eos_token_ids or eos_token_ids,
            config.stop,
            config.return_log_probs,
        )

    def _stream(
        self,
        ids: Sequence[int],
        settings: GenerationSettings,
        config: SamplingConfig,
        session: Any,
    ) -> Iterator[StreamedText]:
        detokenizer = self._new_detokenizer(ids, settings) if config.detokenize else None
        new_ids: list[int] = []
        echoed = self.tokenizer.decode(ids) if config.echo and config.detokenize else ""
        request = TokenRequest(tuple(ids), settings, self._stop_check(ids, settings))
        for token in self.engine.stream(request, config, session):
            new_ids.append(token.token_id)
            is_last = token.finish_reason is not None
            added = detokenizer.next_text(new_ids, is_last) if detokenizer is not None else ""
            yield StreamedText(echoed + added, token.token_id, token.log_prob, token.finish_reason)
            echoed = ""

    def _stop_check(self, ids: Sequence[int], settings: GenerationSettings) -> StopCheck:
        return self._new_detokenizer(ids, settings).has_stop_string if settings.stop else never_stop

    def _new_detokenizer(self, ids: Sequence[int], settings: GenerationSettings) -> Detokenizer:
        return Detokenizer(self.tokenizer, ids, settings.eos_token_ids, settings.stop)

    def _completion(
        self,
        prompt: str,
        ids: Sequence[int],
        settings: GenerationSettings,
        output: CompletionOutput,
        config: SamplingConfig | None = None,
    ) -> Completion:
        text = ""
        if config is None or config.detokenize:
            text = self._new_detokenizer(ids, settings).final_text(output.token_ids)
            text = prompt + text if config is not None and config.echo else text
        return Completion(
            prompt,
            text,
            output.token_ids,
            output.finish_reason,
            tuple(ids),
            output.log_probs,
            output.score,
        )

    def eos_token_ids(self) -> tuple[int, ...]:
        """Return the ids that end a text: those of the model's config, or else the tokenizer's."""
        eos_token_ids = self.engine.eos_token_ids or (self.tokenizer.eos_id,)
        return tuple(token for token in eos_token_ids if token is not None)


def encode_prompt(
    tokenizer: Tokenizer,
    vocab_size: int,
    prompt: str | Sequence[int],
    on_special: Callable[[str], None] | None = None,
) -> list[int]:
    """Return the ids of a prompt; special pieces that a text spells are text.

    Args:
        tokenizer: of the model.
        vocab_size: of the model.
        prompt: a text, or its ids.
        on_special: told the special pieces that the text spells.

    Raises:
        AscendSpeedError: a text with half a surrogate pair, or an id that the model does not have.
    """
    if isinstance(prompt, str):
        check_text(prompt)
        literal = LiteralTokenizer.for_texts(tokenizer, [prompt])
        if literal is None:
            return tokenizer.encode(prompt)
        if on_special is not None:
            on_special(", ".join(literal.spelled(prompt)))
        return literal.encode(prompt)
    wrong = next((token for token in prompt if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise ConfigError(f"prompt id {wrong} is not in 0 to {vocab_size - 1}, the model's vocabulary")
    return list(prompt)


def check_text(text: str) -> None:
    """Raise `DataError` if a text holds half a surrogate pair, which no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text holds half a surrogate pair (\\u{ord(text[error.start]):04x} at character {error.start + 1}); "
            "correct it"
        ) from None


@contextmanager
def named_prompt(name: str) -> Iterator[None]:
    """Let errors begin with the name of the prompt that they are about."""
    try:
        yield
    except AscendSpeedError as error:
        if not name:
            raise
        raise type(error)(f"{name}: {error}") from None


def _separate(prompts: Prompts) -> list[str | Sequence[int]]:
    """Return the prompts one by one; ids alone are one prompt."""
    if isinstance(prompts, str):
        return [prompts]
    if prompts and all(isinstance(one, int) for one in prompts):
        return [cast(Sequence[int], prompts)]
    return list(cast(Sequence[str | Sequence[int]], prompts))
