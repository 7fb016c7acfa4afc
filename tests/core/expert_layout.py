"""A layout with one axis more than the product has today."""

from dataclasses import dataclass

from ascendspeed_core.config.layout import Layout


@dataclass(frozen=True)
class ExpertLayout(Layout):
    """A layout whose data-parallel ranks are `ep` groups, each of which would hold other experts."""

    ep: int = 1

    @property
    def axes(self) -> dict[str, int]:
        return {"pp": self.pp, "edp": self.dp // self.ep, "ep": self.ep, "cp": self.cp, "tp": self.tp}

    @property
    def unions(self) -> dict[str, tuple[str, ...]]:
        return {"dp": ("edp", "ep"), "replicas": ("dp", "cp"), "expert_replicas": ("edp", "cp")}

    def __str__(self) -> str:
        return f"{super().__str__()} x ep{self.ep}"
