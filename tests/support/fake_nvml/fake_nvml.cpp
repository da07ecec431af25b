// The functions of NVML that data/runs calls. Device 2 cannot tell; the others take up
// 250 mJ, and 500 mJ for device 1, between two calls.

#include <initializer_list>

extern "C" {

int nvmlInit_v2() { return 0; }
int nvmlShutdown() { return 0; }

int nvmlDeviceGetHandleByIndex_v2(unsigned number, void** device) {
  static unsigned long long counters[] = {1'000'000, 2'000'000, 0};
  if (number > 2) return 2;
  *device = counters + number;
  return 0;
}

int nvmlDeviceGetTotalEnergyConsumption(void* device, unsigned long long* millijoules) {
  auto* counter = static_cast<unsigned long long*>(device);
  if (*counter == 0) return 3;
  *counter += *counter >= 2'000'000 ? 500 : 250;
  *millijoules = *counter;
  return 0;
}

// Utilisation: two samples more whenever their number is asked for, 100 ms apart; a kernel ran in
// 50 % of the first and in 80 % of the second.
struct Sample {
  unsigned long long microseconds;
  union {
    double real;
    unsigned int whole;
    unsigned long long longest;
  } value;
};
int nvmlDeviceGetSamples(void* device, int kind, unsigned long long since, int* type,
                         unsigned* count, Sample* samples) {
  static unsigned long long now = 1'700'000'000'000'000;
  if (kind != 1) return 2;
  if (*static_cast<unsigned long long*>(device) == 0) return 3;
  *type = 1;
  if (samples == nullptr) {
    now += 200'000;
    *count = 2;
    return 0;
  }
  unsigned given = 0;
  for (const unsigned percent : {50U, 80U}) {
    const unsigned long long at = percent == 50 ? now - 100'000 : now;
    if (at <= since) continue;
    samples[given].microseconds = at;
    samples[given].value.longest = 0;
    samples[given].value.whole = percent;
    ++given;
  }
  *count = given;
  return given == 0 ? 6 : 0;
}
}
