"""Scenes as records of COCO, RefCOCO and gRefCOCO; ids count from 1 in the order of the scenes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmseg_llm.data.synthetic.levels import Level
    from mmseg_llm.data.synthetic.scene import Scene


def scene_record(scene: Scene, file_name: str, split: str) -> dict[str, Any]:
    """What of a scene goes into the files, in builtin types only, before ids are known."""
    height, width = scene.instances.shape
    camera = scene.camera
    return {
        "file_name": file_name,
        "split": split,
        "height": int(height),
        "width": int(width),
        "things": [
            {"shape": thing.shape, "area": thing.area, "box": list(thing.box), "rle": rle.to_coco()}
            for thing, rle in zip(scene.facts.things, scene.encoded_masks(), strict=True)
        ],
        "expressions": [(e.text, list(e.targets), e.family) for e in scene.expressions],
        "camera": None if camera is None else {name: getattr(camera, name) for name in ("fx", "fy", "cx", "cy")},
    }


class Records:
    """Numbers scenes and collects what the files of a dataset hold.

    Attributes:
        images, annotations: of COCO.
        refs: RefCOCO references: one per object, with the expressions that mean it alone.
        grefs: gRefCOCO references: one per set of objects, the empty set (`[-1]`, `no_target`) included.
        cameras: intrinsics by file name.
    """

    def __init__(self, level: Level) -> None:
        self.level = level
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        self.refs: list[dict[str, Any]] = []
        self.grefs: list[dict[str, Any]] = []
        self.cameras: dict[str, dict[str, float]] = {}
        self._num_sentences = 0
        self._families: dict[str, int] = {}
        self._num_targets = {"none": 0, "one": 0, "several": 0}

    def add(self, record: dict[str, Any]) -> dict[str, Any]:
        """Take a record of `scene_record`; gives its line of `questions.jsonl`."""
        image_id = len(self.images) + 1
        self.images.append({"id": image_id, **{key: record[key] for key in ("file_name", "height", "width")}})
        first = len(self.annotations) + 1
        for thing in record["things"]:
            x1, y1, x2, y2 = thing["box"]
            self.annotations.append(
                {
                    "id": len(self.annotations) + 1,
                    "image_id": image_id,
                    "category_id": self.level.categories[thing["shape"]],
                    "segmentation": thing["rle"],
                    "area": thing["area"],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "iscrowd": 0,
                }
            )
        self._add_references(record, image_id, first)
        if record["camera"] is not None:
            self.cameras[record["file_name"]] = record["camera"]
        rles = [thing["rle"] for thing in record["things"]]
        return {
            "file_name": record["file_name"],
            "split": record["split"],
            "height": record["height"],
            "width": record["width"],
            "questions": [
                {"question": text, "family": family, "masks": [rles[i] for i in targets]}
                for text, targets, family in record["expressions"]
            ],
        }

    def _add_references(self, record: dict[str, Any], image_id: int, first: int) -> None:
        """Group the sentences by what they mean; `first` is the annotation id of the first object."""
        groups: dict[tuple[int, ...], list[dict[str, Any]]] = {}
        for text, targets, family in record["expressions"]:
            self._num_sentences += 1
            self._families[family] = self._families.get(family, 0) + 1
            self._num_targets["none" if not targets else "one" if len(targets) == 1 else "several"] += 1
            sentence = {"sent_id": self._num_sentences, "raw": text, "sent": text, "tokens": text.split()}
            groups.setdefault(tuple(targets), []).append(sentence)
        for targets, sentences in groups.items():
            common = {
                "image_id": image_id,
                "file_name": record["file_name"],
                "split": record["split"],
                "sent_ids": [sentence["sent_id"] for sentence in sentences],
                "sentences": sentences,
            }
            annotation_ids = [first + i for i in targets]
            category_ids = [self.annotations[i - 1]["category_id"] for i in annotation_ids]
            self.grefs.append(
                {
                    "ref_id": len(self.grefs) + 1,
                    "ann_id": annotation_ids or [-1],
                    "category_id": category_ids or [-1],
                    "no_target": not targets,
                    **common,
                }
            )
            if len(targets) == 1:
                ids = {"ann_id": annotation_ids[0], "category_id": category_ids[0]}
                self.refs.append({"ref_id": len(self.refs) + 1, **ids, **common})

    def instances(self, description: str) -> dict[str, Any]:
        """The content of `instances.json`."""
        return {
            "info": {"description": description, "version": "1"},
            "licenses": [],
            "images": self.images,
            "annotations": self.annotations,
            "categories": [{"id": number, "name": name} for name, number in self.level.categories.items()],
        }

    def counts(self) -> dict[str, Any]:
        """Numbers of images, objects and expressions, the latter also by number of targets and by family."""
        return {
            "images": len(self.images),
            "annotations": len(self.annotations),
            "expressions": self._num_sentences,
            "targets": dict(self._num_targets),
            "families": dict(sorted(self._families.items())),
        }
