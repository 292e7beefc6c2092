"""Two checkpoints that exist already: measure which restore suits them, write it, verify it.

python restore_and_choose.py BASE TUNED heldout.jsonl   # folders or hub ids, and rows that SFT did not see
python restore_and_choose.py                            # after full_finetuning.py, in the same folder
"""

import sys

import qkguard
from qkguard.demo import MODEL

if len(sys.argv) > 3:
    base, tuned, heldout = sys.argv[1:]
else:
    base, tuned, heldout = str(MODEL), "out-full/_qkguard/final/raw", None  # the rows that the run kept

# one loaded model; every candidate is swapped in and out bit for bit, and the recommended one written
report = qkguard.sweep(base, tuned, data=heldout, lengths=[256, 1024], write="out-chosen", overwrite=True)
for point in report.points:
    print(f"{point.name:28} recall {point.recall.value:.2f}")
print(*report.words, sep="\n")

if not report.recommended.candidate.recommendable:  # raw: nothing was written
    print("The tuned checkpoint is recommended as it is. Queries and keys restored all the same, to compare:")
    qkguard.restore_checkpoint(base, tuned, "out-chosen", method="restore", overwrite=True)
found = qkguard.verify("out-chosen", load=True)
print(f"{found['folder']}: {found['layers']} layers restored by {found['method']}, raw files {found['raw']}")
