"""python -m trainer.main with five of GhostNet's sixteen blocks: every kind of layer, a third of the time to start.

For tests of what surrounds the network; in their long form it is the whole one.
"""

import gc
import os
import sys

COMMAND = [sys.executable, *(['-m', 'trainer.main'] if os.environ.get('LONG_TESTS') else [__file__])]


def few_blocks() -> tuple:
    """Of the block table: stride 1 and 2, kernel 3 and 5, with and without squeeze-and-excite, both shortcuts."""
    from ghostnet import model

    return tuple(model.BLOCKS[i] for i in (0, 1, 3, 4, 9))


if __name__ == '__main__':
    from trainer.main import import_tensorflow, main

    import_tensorflow()
    from ghostnet import model

    model.BLOCKS = few_blocks()
    exit_code = main(sys.argv)
    gc.freeze()  # as trainer.main does
    sys.exit(exit_code)
