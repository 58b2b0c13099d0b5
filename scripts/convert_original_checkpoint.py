# SPDX-License-Identifier: Apache-2.0
"""Convert a checkpoint of the authors' code into a directory with model, image processor and model card.

The architecture is read off the weights. They do not tell how often the encoder's shared layers are passed
(--num_blocks) nor whether the backbone was dilated (--dilation): give what the model was trained with.
"""

import argparse
import sys

from transformers.utils import logging

from deperceiver_hf.conversion.job import convert_checkpoint


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="Lightning's .ckpt, or a .pth with the state dict.")
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", help="New or empty directory.")
    parser.add_argument("--num_blocks", type=int, default=3, help="The original's --enc_blocks (%(default)s).")
    parser.add_argument("--dilation", action="store_true", help="The model was trained with --dilation.")
    parser.add_argument(
        "--position_embedding_type",
        choices=("sine", "learned"),
        help="Refuse a checkpoint with other positions than these.",
    )
    parser.add_argument("--overwrite", action="store_true", help="Write into a directory that is not empty.")
    parser.add_argument("--push_to_hub", metavar="REPO_ID", help="Publish the directory on the Hub.")
    arguments = parser.parse_args()
    try:
        arguments.conversion = convert_checkpoint(**vars(arguments))
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    return arguments


def main() -> int:
    logging.disable_progress_bar()
    print(parse_arguments().conversion.summary())
    return 0


if __name__ == "__main__":
    sys.exit(main())
