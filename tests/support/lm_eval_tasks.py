"""lm-evaluation-harness's own tasks on records that our tasks read: its datasets are not needed."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ascendspeed_eval.tasks.agieval import CLOZE, LETTERS
from ascendspeed_eval.tasks.samples import Benchmark, Record

FILES = {
    "boolq": "super_glue/boolq/default.yaml",
    "mmlu": "mmlu/default/mmlu_{subset}.yaml",
    "gsm8k": "gsm8k/gsm8k.yaml",
    "agieval": "agieval/{subset}.yaml",
    "bbh": "bbh/cot_fewshot/{subset}.yaml",
    "bbh-direct": "bbh/fewshot/{subset}.yaml",
    "ceval": "ceval/ceval-valid_{subset}.yaml",
}


def harness_task(name: str, subset: str, benchmark: Benchmark, num_fewshot: int | None = None) -> Any:
    """Make the task of one subset; its documents are those of `benchmark` in the harness's form."""
    import datasets
    import lm_eval.tasks
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    path = Path(lm_eval.tasks.__file__).parent / FILES[name].format(subset=subset)
    config = {
        key: value
        for key, value in load_yaml(path).items()
        if key
        not in (
            "dataset_path",
            "dataset_name",
            "tag",
            "group",
            "include",
            "task_alias",
            "dataset_kwargs",
            "metadata",
        )
    }
    base = name.removesuffix("-direct")
    asked = _documents(base, (r for r in benchmark.records if r.subset == subset))
    shown = _documents(base, benchmark.examples.get(subset, ()))
    split = config.get("test_split") or config.get("validation_split")
    made = {split: datasets.Dataset.from_list(asked)}
    for key in ("fewshot_split", "training_split"):
        if config.get(key) and shown:
            made[config[key]] = datasets.Dataset.from_list(shown)
        elif config.get(key) and config[key] not in made:
            config.pop(key)
    config["custom_dataset"] = lambda **_: made
    if num_fewshot is not None:
        config["num_fewshot"] = num_fewshot
    task = ConfigurableTask(config=config)
    task.set_fewshot_seed(seed=1234)
    return task


def harness_requests(task: Any) -> list[Any]:
    """Return its requests, those of one document after the other."""
    task.build_all_requests(rank=0, world_size=1)
    return list(task.instances)


def _documents(name: str, records: Iterable[Record]) -> list[dict[str, Any]]:
    return [_document(name, record) for record in records]


def _document(name: str, record: Record) -> dict[str, Any]:
    fields = record.fields
    if name == "boolq":
        # SuperGLUE's passages begin with the title.
        passage = f"{fields['title']} -- {fields['passage']}"
        return {"passage": passage, "question": fields["question"], "label": int(fields["answer"])}
    if name == "mmlu":
        return {
            "question": fields["question"],
            "choices": [fields[letter] for letter in "ABCD"],
            "answer": record.target[0],
        }
    if name == "ceval":
        return {key: fields[key] for key in ("question", "A", "B", "C", "D", "answer")}
    if name == "gsm8k":
        return {"question": fields["question"], "answer": fields["answer"]}
    if name == "bbh":
        return {"input": fields["input"], "target": record.target}
    return _agieval_document(record)


def _agieval_document(record: Record) -> dict[str, Any]:
    """The form of the `hails/agieval-*` datasets: the authors' zero-shot prompt, options and their numbers."""
    fields, subset = record.fields, record.subset
    passage = fields["passage"] or ""
    chinese = subset.startswith(("gaokao", "jec", "logiqa-zh")) and subset != "gaokao-english"
    if subset in CLOZE:
        query = (
            f"{passage}问题：{fields['question']}\n答案："
            if chinese
            else f"{passage}Q: {fields['question']}\nA: The answer is"
        )
        return {"query": query, "answer": fields["answer"]}
    last = LETTERS[len(fields["options"]) - 1]
    shown = " ".join(fields["options"])
    query = (
        f"{passage}问题：{fields['question']} 选项：{shown}\n答案：从A到{last}, 我们应选择"
        if chinese
        else f"{passage}Q: {fields['question']} Answer Choices: {shown}\nA: Among A through {last}, the answer is"
    )
    gold = [LETTERS.index(letter) for letter in record.target if letter in LETTERS]
    return {"query": query, "choices": list(fields["options"]), "gold": gold}


def harness_model(folder: Path, batch_size: int = 8) -> Any:
    """Return its `hf` model on a folder, with the ids of the folder's own tokenizer.

    transformers reads a bare `tokenizer.model` differently from SentencePiece, so ids are given to both sides.
    """
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    from ascendspeed_data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)

    class SameIds(HFLM):  # type: ignore[misc]
        begins_texts = True
        """Whether the tokenizer's own begin of text is kept; for whole texts the harness adds one itself."""

        def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
            return tokenizer.encode(string, self.begins_texts)

        def tok_batch_encode(self, strings: list[str], left_truncate_len: int | None = None, **_: Any) -> Any:
            ids = [tokenizer.encode(text) for text in strings]
            ids = [one[-left_truncate_len:] if left_truncate_len else one for one in ids]
            length = max(map(len, ids))
            padded = [[0] * (length - len(one)) + one for one in ids]
            mask = [[0] * (length - len(one)) + [1] * len(one) for one in ids]
            return torch.tensor(padded), torch.tensor(mask)

        def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
            ids = [tokens] if isinstance(tokens, int) else [int(token) for token in tokens]
            # The harness asks for the spelling of the end of text, to stop there.
            return "</s>" if ids == [tokenizer.eos_id] else tokenizer.decode(ids)

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    fast = _stand_in(PreTrainedTokenizerFast)
    return SameIds(
        pretrained=model,
        tokenizer=fast,
        batch_size=batch_size,
        max_length=model.config.max_position_embeddings,
    )


def _stand_in(kind: Any) -> Any:
    """A tokenizer object that the harness wants to see; it encodes nothing."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    inner = Tokenizer(WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    return kind(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )
