// Functions that do wrong when asked to, built as the sanitized extension is: tests/test_sanitizers.py sees to it that
// each is caught. `at` and `by` come from the caller, so that the compiler can't see what happens.
#include <cstddef>
#include <cstdint>
#include <vector>

#define PROBE extern "C" __attribute__((visibility("default")))

PROBE void write(float* data, int64_t at) { data[at] = 1.0f; }

PROBE float read(const float* data, int64_t at) { return data[at]; }

PROBE float read_at_byte(const char* data, int64_t at) { return *reinterpret_cast<const float*>(data + at); }

PROBE int64_t multiply(int64_t a, int64_t by) { return a * by; }

PROBE int64_t to_integer(double a) { return static_cast<int64_t>(a); }

PROBE int table(int64_t at) {
  static const int rows[4] = {1, 2, 3, 4};
  return rows[at];
}

PROBE int entry_of_vector(int64_t at) { return std::vector<int>(4, 1)[static_cast<size_t>(at)]; }

PROBE int shift(int64_t by) { return 1 << by; }
