// What the launchers of csrc/common ask of the CUDA runtime, and how often. Prints a line for each.
#include <cstdio>

#include "../csrc/common/cluster_cuda.h"

using namespace tpk;

namespace {

void first(int) {}
void second(int) {}

void print(const char* what) {
    std::printf("%s:", what);
    for (const auto& [name, times] : fake::calls) std::printf(" %s %d", name.c_str() + strlen("cuda"), times);
    std::printf("\n");
    fake::calls.clear();
}

void launch_cluster(void (*kernel)(int), int blocks, size_t bytes) {
    const int at_once = active_clusters("launch", kernel, blocks, 256, bytes);
    launch_clusters("launch", kernel, at_once, blocks, 256, bytes, nullptr, 0);
}

// From device `before` to `to` and back.
void change(int before, bool used, int to) {
    fake::current = before;
    fake::has_context[0] = before == 0 && used;
    fake::has_context[1] = before == 1 && used;
    {
        const OnDevice on_device(to);
    }
    std::printf("from %d%s to %d: then %d, contexts on%s%s\n", before, used ? "" : " unused", to, fake::current,
                fake::has_context[0] ? " 0" : "", fake::has_context[1] ? " 1" : "");
}

}  // namespace

int main() {
    change(0, false, 1);
    change(0, true, 1);
    change(1, true, 0);
    change(1, true, 1);

    fake::current = 0;
    launch_with_shared("launch", first, 1, 64, 1 << 15, nullptr, 0);
    print("shared memory, first launch");
    launch_with_shared("launch", first, 1, 64, 1 << 15, nullptr, 0);
    print("second launch");
    launch_with_shared("launch", second, 1, 64, 1 << 15, nullptr, 0);
    print("another kernel");
    fake::current = 1;
    launch_with_shared("launch", first, 1, 64, 1 << 15, nullptr, 0);
    print("another device");

    fake::current = 0;
    launch_cluster(second, 4, 1024);
    print("clusters, first launch");
    launch_cluster(second, 4, 1024);
    print("second launch");
    launch_cluster(second, 8, 1024);
    print("more blocks");
    launch_cluster(second, 8, 2048);
    print("more bytes");
    launch_cluster(first, 8, 2048);
    print("another kernel");
    fake::current = 1;
    launch_cluster(second, 4, 1024);
    print("another device");
    for (const int device : {0, 1}) {
        fake::current = device;
        for (const int blocks : {4, 8})
            std::printf("at once on %d, of %d blocks: %d\n", device, blocks,
                        active_clusters("launch", second, blocks, 256, 1024));
    }
}
