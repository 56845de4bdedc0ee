// Asynchronous copies. They arrive as late as they may.

#include <cstring>
#include <string>

#include "fibers.h"

namespace emulation {

// The destination is poisoned now and written when the copy is waited for: both those who read too early
// and those who still needed what was there notice.
void cp_async(void* shared, const void* global, unsigned num_bytes, bool valid) {
    Fiber& fiber = this_fiber();
    unsigned char* const to = static_cast<unsigned char*>(shared);
    const unsigned char* const from = static_cast<const unsigned char*>(global);
    if (reinterpret_cast<uintptr_t>(to) % num_bytes || (valid && reinterpret_cast<uintptr_t>(from) % num_bytes)) {
        fail(fiber, "cp_async of " + std::to_string(num_bytes) + " bytes that are not aligned");
    }
    if (to < fiber.dynamic_shared || fiber.dynamic_shared + fiber.shared_bytes < to + num_bytes) {
        fail(fiber, "cp_async to a place outside of dynamic shared memory");
    }
    memset(to, POISON, num_bytes);
    fiber.copies.push_back({to, from, num_bytes, valid});
}

void cp_async_commit() {
    Fiber& fiber = this_fiber();
    fiber.groups.push_back(fiber.copies.size());
}

void cp_async_wait(unsigned num_pending) {
    Fiber& fiber = this_fiber();
    if (fiber.groups.size() <= num_pending) {
        return;
    }
    const size_t num_groups = fiber.groups.size() - num_pending;
    const size_t num_copies = fiber.groups[num_groups - 1];
    for (size_t i = 0; i < num_copies; i++) {
        const Copy& copy = fiber.copies[i];
        if (copy.valid) {
            memcpy(copy.to, copy.from, copy.num_bytes);
        } else {
            memset(copy.to, 0, copy.num_bytes);
        }
    }
    fiber.copies.erase(fiber.copies.begin(), fiber.copies.begin() + long(num_copies));
    fiber.groups.erase(fiber.groups.begin(), fiber.groups.begin() + long(num_groups));
    for (size_t& end : fiber.groups) {
        end -= num_copies;
    }
}

}  // namespace emulation
