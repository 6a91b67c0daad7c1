"""Download PASCAL VOC 2012, verified and resumable: `python download_voc.py [--root data] [--with-sbd]`.

2 GB arrive as ROOT/VOCdevkit/VOC2012 (1,464 training and 1,449 validation images). `--with-sbd` adds the labels of
SBD (1.4 GB) as SegmentationClassAug and the list train_aug.txt with 10,582 images.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from download.sources import get_voc
from runtime.command import run


def main(argv: list[str] | None = None) -> None:
    """Run the command. Raises UserError or OSError; `command.run` turns them into a line and an exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder for the data (default: %(default)s)")
    parser.add_argument("--with-sbd", action="store_true", help="add SBD: 10,582 training images (needs scipy)")
    parser.add_argument("--keep-archive", action="store_true", help="do not remove the archive after unpacking")
    parser.add_argument("--mirror", default="", metavar="URL", help="https address of the same archive, tried first")
    args = parser.parse_args(argv)
    voc = get_voc(args.root, args.with_sbd, args.keep_archive, args.mirror)
    options = f" --set {shlex.quote(f'dataset.root={args.root}')}" if args.root != Path("data") else ""
    options += "" if args.with_sbd else " --set dataset.train_split=train"  # the configuration's split needs SBD
    print(f"complete and verified: {voc}\nnext:")
    print(f"  python dataset.py --config configs/pascal.yaml{options}")
    print(f"  python train.py --config configs/pascal.yaml{options}")


if __name__ == "__main__":
    run(main)
