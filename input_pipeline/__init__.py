"""Examples in, batches out: deterministic, resumable at any position, the same for any number of workers."""
from input_pipeline import order, preprocess
from input_pipeline.augment import make_auto_augment, make_color_jitter, make_rand_augment
from input_pipeline.dataset import eval_dataset, train_dataset, why_bad
from input_pipeline.preprocess import make_random_resized_crop, make_random_shift
from input_pipeline.sources import DataError, Source, open_source
from input_pipeline.sources.idx import array_source

__all__ = ['DataError', 'Source', 'array_source', 'eval_dataset', 'make_auto_augment', 'make_color_jitter',
           'make_rand_augment', 'make_random_resized_crop', 'make_random_shift', 'open_source', 'order', 'preprocess',
           'train_dataset', 'why_bad']
