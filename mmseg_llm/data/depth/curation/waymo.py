"""Waymo Open Dataset v2 (parquet): street scenes, five cameras, five lidars.

<training | validation>/<component>/<segment>.parquet with the components camera_image, camera_calibration, lidar,
lidar_calibration, lidar_camera_projection, lidar_pose, vehicle_pose
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from mmseg_llm.data.depth.curation.base import Curator, Frame, View, each_frame, folder_of, need
from mmseg_llm.data.depth.curation.lidar import move, visible_points
from mmseg_llm.data.depth.curation.waymo_tables import TIME, cameras_of, cloud_of, images_of, rows_of
from mmseg_llm.data.depth.points import Unusable

FOLDERS = {"train": "training", "val": "validation"}
CAMERAS = {1: "FRONT", 2: "FRONT_LEFT", 3: "FRONT_RIGHT", 4: "SIDE_LEFT", 5: "SIDE_RIGHT"}


class Waymo(Curator):
    """Distance along the ray from the camera at the time of its image, without hidden points.

    Labels stay in the pixels of the image as it is, which Waymo gives for every lidar return; `distortion` says how to get rid of
    it. Images are written as the JPEG bytes of the parquet files.
    """

    name = "waymo"
    distance = "ray"
    valid_range = (1.0, 200.0)
    label_source = (
        "first lidar returns in lidar_camera_projection, ego-motion compensated, "
        "occlusion tested above and below (8 px, 10 %)"
    )
    splits = ("train", "val")
    split_rule = "official: folders of segments"
    exports_images = True

    def frames(self, root: Path, split: str) -> Iterator[Frame]:
        """Five per time, segment by segment."""
        need("pyarrow.parquet", "the Waymo Open Dataset v2")
        folder = folder_of(root / FOLDERS[split] / "camera_image", "give the folder that holds training and validation")
        for path in sorted(folder.glob("*.parquet")):
            yield from each_frame(path.stem, partial(_segment, folder.parent, path.stem))


def _segment(folder: Path, segment: str) -> Iterator[Frame]:
    rows = rows_of(folder / "camera_image" / f"{segment}.parquet", ("key.camera_name",))
    for time, camera in sorted((int(row[TIME]), int(row["key.camera_name"])) for row in rows):
        name = CAMERAS.get(camera, str(camera))
        image = f"waymo_images/{segment}/{time}_{name}.jpg"
        view, picture = partial(_view, folder, segment, time, camera), partial(_picture, folder, segment, time, camera)
        yield Frame(image, segment, view, picture, name)


def _view(folder: Path, segment: str, time: int, number: int) -> View:
    from PIL import Image

    camera, mount, size = cameras_of(folder, segment)[number]
    content, vehicle = images_of(folder, segment, time)[number]
    with Image.open(io.BytesIO(content)) as image:
        if (image.height, image.width) != size:
            raise Unusable("the image is of another size than its calibration says", "image of another size")
    points, spots = cloud_of(folder, segment, time)
    first, second = spots[:, 0] == number, spots[:, 3] == number
    pixels = np.where(first[:, None], spots[:, 1:3], spots[:, 4:6])[first | second].astype(np.int64)
    origin = move(vehicle, mount[None, :3, 3])
    metres = np.linalg.norm(points[first | second] - origin, axis=-1)
    is_inside = (pixels >= 0).all(axis=-1) & (pixels[:, 0] < size[1]) & (pixels[:, 1] < size[0])
    pixels, metres = pixels[is_inside], metres[is_inside]
    is_seen = visible_points(pixels, metres, size)
    return View(size, camera, pixels[is_seen], metres[is_seen])


def _picture(folder: Path, segment: str, time: int, number: int) -> bytes:
    return images_of(folder, segment, time)[number][0]
