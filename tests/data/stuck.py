"""A webdataset pipeline whose data stop coming: `pipeline: tests.data.stuck:samples`."""

import time

from tests.data.material import encoded, picture

N_GIVEN = 256  # then nothing more comes, as from a dead mount


def samples(part, parts):
    for i in range(N_GIVEN):
        yield {"__key__": str(i), "png": encoded(picture(i)), "txt": f"caption {i}".encode()}
    time.sleep(3600)
