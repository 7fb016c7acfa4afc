"""Options of fine-tuning: those of pre-training, and what instruction sets need."""

from typing import Self

from pydantic import Field, model_validator

from ascendspeed_core.config.lora import LoraConfig
from ascendspeed_core.config.records import RecordsConfig
from ascendspeed_core.config.training import DataConfig, PretrainConfig


class PaddedDataConfig(DataConfig):
    """Samples of different lengths, each a row of its own."""

    variable_seq_lengths: bool = Field(
        True,
        description="Pad samples to the longest of their batch instead of to --seq-length; only for "
        "instruction samples.",
    )
    pad_to_multiple_of: int = Field(
        8, ge=1, description="Round padded lengths up to a multiple of this, at most --seq-length."
    )

    @property
    def lengths_vary(self) -> bool:
        """Whether samples are padded to the longest of their step, rather than to `seq_length`."""
        return self.variable_seq_lengths

    def refuse_document_options(self, labels: str) -> None:
        """Raise `ValueError` when an option of plain text is given.

        Args:
            labels: what says of the samples what is learned.
        """
        for name in self.document_options:
            why = (
                labels if name == "eod_mask_loss" else "attention and positions are each sample's own anyway"
            )
            raise ValueError(f"{name}=true is for plain text; {why}: leave it out")


class FinetuneDataConfig(PaddedDataConfig):
    """Which samples are trained on."""

    is_instruction_dataset: bool = Field(
        False,
        description="The data holds instruction samples with labels (made by an instruction handler of asd-data "
        "preprocess, packed or not). Without this flag: plain text.",
        json_schema_extra={"off": ""},
    )

    @model_validator(mode="after")
    def _options_of_instruction_sets(self) -> Self:
        given = {"variable_seq_lengths", "pad_to_multiple_of"} & self.model_fields_set
        if given and not self.is_instruction_dataset:
            raise ValueError(
                f"{', '.join(sorted(given))} means nothing without --is-instruction-dataset; give it too, or leave it "
                "out"
            )
        if self.is_instruction_dataset:
            self.refuse_document_options("the labels of an instruction set say what is learned")
        return self

    @property
    def lengths_vary(self) -> bool:
        """Whether samples are padded to the longest of their step, rather than to `seq_length`."""
        return self.is_instruction_dataset and self.variable_seq_lengths


class TuneConfig(PretrainConfig):
    """What tunes a trained model: --load gives only the weights, unless it is the folder of --save."""

    lora: LoraConfig = LoraConfig()

    @property
    def takes_weights_only(self) -> bool:
        """Whether a --load outside --save gives only weights, and the run begins its own data and schedule."""
        return True

    @property
    def adapters(self) -> LoraConfig | None:
        """Options of the adapters that are trained in place of the weights, if any are."""
        return self.lora if self.lora.is_on else None


class FinetuneConfig(TuneConfig):
    """Everything `asd-core finetune` takes; the sections of a TOML recipe."""

    data: FinetuneDataConfig
    records: RecordsConfig = RecordsConfig()

    @property
    def objective(self) -> str:
        """Name of what the run trains for, see `objectives.registry`."""
        return "sft" if self.data.is_instruction_dataset else "next_token"
