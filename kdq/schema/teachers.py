"""Teachers that are no arm of the experiment."""

import dataclasses

from kdq.fields import field


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ensemble:
    """Teachers that are averaged."""

    kind: str = "ensemble"
    arms: tuple[str, ...] = field(some=True, refers=("arms",))
    weights: tuple[float, ...] = field((), above=0)  # one an arm; () is equal ones
    average: str = field("probability", one_of=("probability", "logit"))

    @property
    def needs(self) -> tuple[str, ...]:
        """The arms that have to be there."""
        return self.arms


@dataclasses.dataclass(frozen=True, kw_only=True)
class MovingAverage:
    """The exponential moving average of the student itself."""

    kind: str = "moving_average"
    decay: float = field(0.999, at_least=0, below=1)
    needs = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peer:
    """A network trained at once, that learns from the student in turn."""

    kind: str = "peer"
    model: str = field(refers=("models",))
    # Float arm whose selected weights it starts from; "" is fresh weights.
    init: str = field("", refers=("arms",))

    @property
    def needs(self) -> tuple[str, ...]:
        """The arms that have to be there."""
        return (self.init,) if self.init else ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class FormerPeer:
    """The peer of an arm, as it was at the step that the arm selected; it learns no more."""

    kind: str = "former_peer"
    arm: str = field(refers=("arms",))  # one whose teacher is a peer

    @property
    def needs(self) -> tuple[str, ...]:
        """The arms that have to be there."""
        return (self.arm,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packed:
    """A model in a packed file."""

    kind: str = "packed"
    path: str = field(some=True, path=True)
    needs = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shuffled:
    """A control: an arm's logits, each moved to another training example."""

    kind: str = "shuffled"
    arm: str = field(refers=("arms",))
    within_class: bool = True  # to one of the same label: the class is taught, the example is not

    @property
    def needs(self) -> tuple[str, ...]:
        """The arms that have to be there."""
        return (self.arm,)


TeacherConfig = Ensemble | MovingAverage | Peer | FormerPeer | Packed | Shuffled
TEACHERS = {
    "ensemble": Ensemble,
    "moving_average": MovingAverage,
    "peer": Peer,
    "former_peer": FormerPeer,
    "packed": Packed,
    "shuffled": Shuffled,
}
