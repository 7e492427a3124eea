# The server as an image.  DEVICE chooses the build of torch: cpu, or cuda for machines with an NVIDIA driver.
#
#   docker build -t continuo .
#   docker run -p 50051:50051 -v continuo:/var/lib/continuo continuo [MODEL and other arguments of `continuo serve`]
#
# The compiler stays in the first stage.  Its kernels are for every instruction set: the machine that runs the
# image chooses among them.  Only with DEVICE=cuda is there a compiler in the image, for Triton compiles what joins
# its kernels to the driver where they run.  That image is untried: docker run --gpus all ...

FROM python:3.11-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev
RUN python -m venv /opt/continuo
ENV PATH=/opt/continuo/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY tools/constraints.txt tools/constraints.txt
ARG DEVICE=cpu
RUN case $DEVICE in \
        cpu) from="--no-deps --index-url https://download.pytorch.org/whl/cpu" ;; \
        cuda) from="" ;; \
        *) echo "DEVICE is $DEVICE; it must be cpu or cuda" >&2; exit 2 ;; \
    esac; \
    pip install -c tools/constraints.txt $from "$(grep "^torch==" tools/constraints.txt)"
COPY . .
RUN pip install -c tools/constraints.txt ".[server]"
WORKDIR /
RUN python -c "from kernels.native.build import INSTRUCTION_SETS, build, cpu_flags; \
[build(isa).parent.chmod(0o755) for isa in INSTRUCTION_SETS if cpu_flags()]"

FROM python:3.11-slim
ARG DEVICE=cpu
RUN if [ $DEVICE = cuda ]; then \
        apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev; \
    fi
COPY --from=build /opt/continuo /opt/continuo
RUN useradd --create-home --uid 10001 continuo && install -d -m 700 -o continuo -g continuo /var/lib/continuo
ENV PATH=/opt/continuo/bin:$PATH PYTHONSAFEPATH=1 XDG_STATE_HOME=/var/lib HF_HOME=/var/lib/continuo/hub \
    TRITON_CACHE_DIR=/var/lib/continuo/triton NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER continuo
WORKDIR /home/continuo
VOLUME /var/lib/continuo
EXPOSE 50051
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m CMD ["continuo", "health"]
ENTRYPOINT ["python", "-m", "tools.image_entry"]
