"""The settings of a run as plain values: what `train.*` and `data.*` in a gin file mean, and which values are right."""
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# A resumed run may differ in these: they say where, how often or how fast, not what is computed.
NOT_IN_FINGERPRINT = re.compile(
    r'build_strategy\..*|evaluate\..*|data\.(default_dir|otherwise|cache)|train\.(steps_per_loop|jit|max_steps|'
    r'checkpoint_.*|keep_.*|log_.*|eval_.*|save_.*|bad_example_budget|max_rollbacks|grace_secs|'
    r'step_timeout_secs|allow_config_change)')


class ConfigError(Exception):
    """A mistake of the user's, in one line that names the value, where it came from and what would be right."""


def require(is_right: bool, name: str, value: object, right: str) -> None:
    """Raises the ConfigError of a value that is not right."""
    if not is_right:
        raise ConfigError(f'{name} is {value!r}; it must be {right}')


def is_number(value: object, minimum: float = -math.inf, below: float = math.inf, kind: Any = int | float) -> bool:
    """Whether it is a number of that kind, and neither NaN nor infinite, with minimum <= value < below."""
    return isinstance(value, kind) and not isinstance(value, bool) and minimum <= value < below


def _are_stages(value: object) -> bool:
    pairs = value if isinstance(value, tuple | list) else ()
    epochs = [pair[0] for pair in pairs if isinstance(pair, tuple | list) and len(pair) == 2 and is_number(pair[0], 0)
              and is_number(pair[1], 1, kind=int)]
    return epochs[:1] == [0] and len(epochs) == len(pairs) and epochs == sorted(set(epochs))


def _check(settings: object, root: str, *rules: tuple) -> None:
    """Requires by each rule, (what is right, in words, *names of settings); what is None by default may stay None."""
    for is_right, right, *names in rules:
        for name in names:
            value, is_optional = getattr(settings, name), getattr(type(settings), name, '') is None
            require(is_optional and value is None or is_right(value), f'{root}.{name}', value,
                    'None or ' * is_optional + right)


@dataclass(frozen=True)
class Train:
    """`train.*`: everything of a recipe that is not a part of its own."""

    epochs: float  # passes over the training split; num_steps = floor(epochs * N / global_batch_size)
    global_batch_size: int  # examples a step, over all replicas
    model: Callable  # factory of a Keras model: model() -> [B, H, W, 3] normalised images to logits
    optimizer: Callable  # factory of (init, update), see optimizer.py
    schedule: Callable  # factory of f(step) -> learning rate, see schedule.py
    seed: int = 0  # of initial weights, order, augmentation and dropout
    max_steps: int | None = None  # stop here; the schedule still runs over all epochs
    steps_per_loop: int = 100  # steps on the device between two touches of the host, at most: see grace_secs
    jit: bool | str = 'auto'  # compile with XLA; 'auto' does on GPU and TPU, not on the CPU
    precision: str = 'float32'  # 'tf32' is float32 whose matrix products round their factors to 10 bits, on GPUs
    all_reduce_dtype: str = 'float32'  # 'bfloat16' halves what gradients cost between devices, and rounds them
    label_smoothing: float = 0.0
    mixup_alpha: float | None = None  # pairs of images are mixed by a part ~ Beta(alpha, alpha), one for a whole step
    cutmix_alpha: float | None = None  # the part is the area of a box; with both alphas each takes half of the steps
    erase_probability: float = 0.0  # of an image to have a rectangle filled with noise
    accumulate: int = 1  # parts that a replica's rows are worked off in; each has batch statistics of its own
    clip_norm: float | None = None  # largest global norm of the gradient, taken after the all-reduce
    adaptive_clip: float | None = None  # largest norm of a unit's gradient, as a part of its parameters' norm
    spike_factor: float | None = None  # a step whose gradient norm is so many times the usual one is skipped
    rollback_after: int | None = None  # skipped steps in a row; then back to a periodic checkpoint, and past them
    max_rollbacks: int = 3
    ema_decay: float | None = None  # keeps an exponential moving average of the weights and evaluates it too
    sync_batch_norm: bool = False  # batch statistics of the global batch, not of each replica's rows
    checkpoint_every_steps: int = 1000
    checkpoint_every_secs: float | None = None  # also that often by the clock, at the end of a loop of steps
    keep_checkpoints: int = 3
    keep_every_steps: int | None = None  # checkpoints of multiples of it are kept too
    save_retry_secs: float = 600.0  # how long a disk may be full before the run ends with code 1
    initial_weights: str | None = None  # of a checkpoint or a PyTorch file, as far as they fit, for a new run
    bad_example_budget: float = 0.001  # the part of a split's examples that may be unusable
    image_sizes: tuple[tuple[float, int], ...] | None = None  # (from epoch, pixels): smaller images first are faster
    eval_every_epochs: float = 1
    eval_flip: bool = False  # logits are the mean of those of an image and of its mirror image: twice the time
    eval_precise_batch_norm: int = 0  # training batches to take statistics from before each evaluation; 0: the moving
    log_every_steps: int = 100
    grace_secs: float = 30.0  # between a signal to stop and the end; a loop of steps may take half of it
    step_timeout_secs: float = 3600.0  # ends the process with code 75 if no loop of steps returns for that long
    allow_config_change: bool = False  # resume although the recipe differs from the checkpoint's

    def __post_init__(self):
        _check(
            self, 'train', (lambda v: is_number(v) and v > 0, 'a positive number', 'epochs', 'eval_every_epochs',
                            'mixup_alpha', 'cutmix_alpha', 'clip_norm', 'adaptive_clip'),
            (lambda v: is_number(v, 0) and v <= 1, 'a number in [0, 1]', 'erase_probability'),
            (lambda v: is_number(v) and v > 0, 'a positive number of seconds', 'grace_secs', 'step_timeout_secs',
             'save_retry_secs', 'checkpoint_every_secs'),
            (lambda v: is_number(v, 0, 1), 'at least 0 and below 1', 'label_smoothing', 'bad_example_budget',
             'ema_decay'), (lambda v: is_number(v, 1), 'a number from 1', 'spike_factor'),
            (lambda v: isinstance(v, str) and v, 'the path of a checkpoint or a file of weights', 'initial_weights'),
            (lambda v: is_number(v, 1, kind=int), 'a positive integer', 'global_batch_size', 'steps_per_loop',
             'accumulate', 'checkpoint_every_steps', 'keep_checkpoints', 'log_every_steps', 'max_steps',
             'keep_every_steps', 'rollback_after'),
            (lambda v: is_number(v, 0, 2**32, kind=int), 'an integer from 0 below 2**32', 'seed', 'max_rollbacks'),
            (lambda v: is_number(v, 0, kind=int), 'a number of batches, or 0', 'eval_precise_batch_norm'),
            (lambda v: isinstance(v, bool), 'True or False', 'sync_batch_norm', 'eval_flip', 'allow_config_change'),
            (lambda v: v in ('auto', True, False), "'auto', True or False", 'jit'),
            (lambda v: v in ('float32', 'tf32', 'mixed_bfloat16', 'mixed_float16'),
             "'float32', 'tf32', 'mixed_bfloat16' or 'mixed_float16'", 'precision'),
            (lambda v: v in ('float32', 'bfloat16'), "'float32' or 'bfloat16'", 'all_reduce_dtype'),
            (lambda v: callable(v) and not hasattr(v, 'stateless_call'),  # what @ghostnet() gives can be called too
             'a reference without parentheses, as @ghostnet, @sgd or @cosine', 'model', 'optimizer', 'schedule'),
            (_are_stages, 'pairs of an epoch and pixels as ((0, 128), (10, 224)), epochs rising from 0', 'image_sizes'))
        require(self.adaptive_clip is None or self.clip_norm is None, 'train.adaptive_clip', self.adaptive_clip,
                f'None where train.clip_norm is set ({self.clip_norm!r})')
        require(self.spike_factor is None or self.rollback_after is not None, 'train.spike_factor', self.spike_factor,
                'None where train.rollback_after is: or a norm that stays high would stop the training for good')
        require(not (self.sync_batch_norm and self.accumulate > 1), 'train.accumulate', self.accumulate,
                '1 with train.sync_batch_norm, which takes statistics of the whole global batch at once')

    def image_size_at(self, step: int, steps_per_epoch: float) -> dict[str, int]:
        """{'image_size': pixels} from image_sizes, or nothing: then train_dataset's own counts."""
        sizes = [size for epoch, size in self.image_sizes or () if round(epoch * steps_per_epoch) <= step]
        return {'image_size': sizes[-1]} if sizes else {}


@dataclass(frozen=True)
class Data:
    """`data.*`: which examples, and the constants of their pixels."""

    name: str  # see input_pipeline.open_source
    train_split: str = 'train'
    eval_split: str = 'validation'
    default_dir: str | None = None  # where the data is if --data_dir is not given
    otherwise: str | None = None  # name to take if that directory is not there; TFDS may download it
    cache: bool = False  # keep encoded training images in memory: in time the whole split, in each process
    pixel_mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # of R, G, B in 0..1; ImageNet's
    pixel_std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self):
        three = 'three numbers for R, G, B in 0..1, standard deviations above 0'
        _check(self, 'data', (lambda v: isinstance(v, str) and v != '', 'a name', 'name', 'train_split', 'eval_split'),
               (lambda v: isinstance(v, str), 'a string', 'default_dir', 'otherwise'),
               (lambda v: isinstance(v, bool), 'True or False', 'cache'),
               (lambda v: isinstance(v, tuple | list) and len(v) == 3 and all(is_number(x, 0) and x <= 1 for x in v),
                three, 'pixel_mean', 'pixel_std'), (lambda v: min(v) > 0, three, 'pixel_std'))


@dataclass(frozen=True)
class Evaluate:
    """`evaluate.*`: what --mode=eval takes."""

    checkpoint: str = 'latest'  # 'latest', 'best', or the path of a checkpoint directory
    weights: str = 'raw'  # 'raw' or 'ema'

    def __post_init__(self):
        _check(self, 'evaluate', (lambda v: v in ('raw', 'ema'), "'raw' or 'ema'", 'weights'), (
            lambda v: isinstance(v, str) and v, "'latest', 'best' or the path of a checkpoint directory", 'checkpoint'))
