// The fake itself: it is late, keeps to streams and events and to nothing else, and tells on those
// who rely on more.

#include "tests/support/fake_device.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <set>

namespace tailor {
namespace {

using testing::Contains;
using testing::Each;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::SizeIs;

constexpr std::int64_t kBytes = 64;
constexpr auto kUp = CopyKind::host_to_device;
constexpr auto kDown = CopyKind::device_to_host;

std::vector<unsigned char> bytes_of(const void* data, std::int64_t bytes = kBytes) {
  const auto* first = static_cast<const unsigned char*>(data);
  return {first, first + bytes};
}
DeviceMemory filled(FakeDevice& device, int value) {
  DeviceMemory out(device, kBytes, MemoryKind::pinned);
  std::memset(out.data(), value, kBytes);
  return out;
}

TEST(FakeDevice, memory_is_poisoned_when_allocated_and_when_freed) {
  FakeDevice device;
  void* memory = device.allocate(kBytes);
  EXPECT_THAT(bytes_of(memory), Each(FakeDevice::kPoison));
  std::memset(memory, 1, kBytes);
  device.free(memory);
  EXPECT_THAT(bytes_of(memory), Each(FakeDevice::kPoison));
  EXPECT_THAT(device.violations(), IsEmpty());
  static_cast<unsigned char*>(memory)[5] = 1;
  EXPECT_THAT(device.violations(), Contains(HasSubstr("freed memory was written")));
  EXPECT_THAT(device.violations(), IsEmpty()) << "told once";
  device.free(memory);
  EXPECT_THAT(device.violations(), Contains(HasSubstr("not allocated")));
}

TEST(FakeDevice, a_copy_is_late_and_its_destination_poison_until_then) {
  FakeDevice device;
  const DeviceMemory from = filled(device, 1), to(device, kBytes, MemoryKind::device);
  std::memset(to.data(), 7, kBytes);
  const Stream stream(device);
  const Event done(device);
  device.hold();
  device.copy_async(to.data(), from.data(), kBytes, kUp, stream);
  device.record(done, stream);
  EXPECT_FALSE(device.poll(done));
  EXPECT_THAT(bytes_of(to.data()), Each(FakeDevice::kPoison));
  std::memset(from.data(), 2, kBytes);  // a slot that is used again too early
  device.release();
  device.synchronise(done);
  EXPECT_TRUE(device.poll(done));
  EXPECT_THAT(bytes_of(to.data()), Each(2));
}

TEST(FakeDevice, a_destination_is_not_poisoned_while_earlier_work_of_its_stream_reads_it) {
  for (std::uint32_t seed = 0; seed < 20; ++seed) {
    FakeDevice device(seed);
    const DeviceMemory one = filled(device, 1), two = filled(device, 2);
    const DeviceMemory slot(device, kBytes, MemoryKind::device);
    const Stream stream(device);
    std::vector<unsigned char> seen;
    device.copy_async(slot.data(), one.data(), kBytes, kUp, stream);
    device.run_async(
        {{slot.data(), kBytes}}, {}, [&] { seen = bytes_of(slot.data()); }, stream);
    device.copy_async(slot.data(), two.data(), kBytes, kUp, stream);
    device.synchronise(StreamHandle(stream));
    EXPECT_THAT(seen, Each(1));
    EXPECT_THAT(bytes_of(slot.data()), Each(2));
    EXPECT_THAT(device.violations(), IsEmpty());
  }
}

TEST(FakeDevice, streams_are_in_no_order_unless_events_give_one) {
  std::set<std::string> orders, ordered;
  for (std::uint32_t seed = 0; seed < 40; ++seed) {
    for (const bool with_events : {false, true}) {
      FakeDevice device(seed);
      const Stream streams[3] = {Stream(device), Stream(device), Stream(device)};
      Event last(device);
      std::string order;
      device.hold();
      for (int i = 0; i < 6; ++i) {
        const Stream& stream = streams[i % 3];
        if (with_events) device.wait(stream, last);
        device.run_async(
            {}, {}, [&order, i] { order += static_cast<char>('0' + i); }, stream);
        device.record(last, stream);
      }
      device.release();
      for (const Stream& stream : streams) device.synchronise(StreamHandle(stream));
      for (int i = 0; i < 3; ++i) {
        EXPECT_LT(order.find(static_cast<char>('0' + i)), order.find(static_cast<char>('3' + i)))
            << "order within a stream";
      }
      (with_events ? ordered : orders).insert(order);
    }
  }
  EXPECT_GT(orders.size(), 5U) << "of 90";
  EXPECT_THAT(ordered, testing::ElementsAre("012345"));
}

TEST(FakeDevice, a_missing_wait_is_told_whatever_the_timing) {
  for (const bool with_wait : {true, false}) {
    FakeDevice device;
    const DeviceMemory from = filled(device, 1), to = filled(device, 0);
    const DeviceMemory slot(device, kBytes, MemoryKind::device);
    const Stream up(device), down(device);
    const Event arrived(device);
    device.copy_async(slot.data(), from.data(), kBytes, kUp, up);
    device.record(arrived, up);
    std::atomic<bool> ended = false;  // the timing is lucky, but nobody may count on it
    device.run_async(
        {}, {}, [&] { ended = true; }, up);
    while (!ended) std::this_thread::yield();
    if (with_wait) device.wait(down, arrived);
    device.copy_async(to.data(), slot.data(), kBytes, kDown, down);
    device.synchronise(StreamHandle(down));
    device.synchronise(StreamHandle(up));
    if (with_wait) {
      EXPECT_THAT(device.violations(), IsEmpty());
      EXPECT_THAT(bytes_of(to.data()), Each(1));
    } else {
      EXPECT_THAT(device.violations(), Contains(HasSubstr("nothing orders them")));
    }
  }
}

TEST(FakeDevice, order_passes_through_the_host_and_through_other_streams) {
  FakeDevice device;
  const DeviceMemory one = filled(device, 1), two = filled(device, 2);
  const DeviceMemory slot(device, kBytes, MemoryKind::device);
  const Stream a(device), b(device), c(device);
  const Event in_a(device), in_b(device), in_c(device);
  device.copy_async(slot.data(), one.data(), kBytes, kUp, a);
  device.record(in_a, a);
  device.wait(b, in_a);
  device.record(in_b, b);
  device.wait(c, in_b);  // after a's copy by way of b
  device.copy_async(slot.data(), two.data(), kBytes, kUp, c);
  device.record(in_c, c);
  while (!device.poll(in_c)) std::this_thread::yield();
  device.copy_async(slot.data(), one.data(), kBytes, kUp, b);  // after c's, which the host saw end
  device.synchronise(StreamHandle(b));
  EXPECT_THAT(bytes_of(slot.data()), Each(1));
  EXPECT_THAT(device.violations(), IsEmpty());
}

TEST(FakeDevice, the_host_has_to_wait_before_it_touches) {
  FakeDevice device;
  const DeviceMemory from = filled(device, 1), slot(device, kBytes, MemoryKind::device);
  const Stream stream(device);
  const Event done(device);
  device.copy_async(slot.data(), from.data(), kBytes, kUp, stream);
  device.record(done, stream);
  device.expect_readable(from.data(), kBytes);
  device.expect_readable(slot.as<char>() + kBytes, 10);  // beside it
  EXPECT_THAT(device.violations(), IsEmpty());
  device.expect_writable(from.data(), 1);
  device.expect_readable(slot.as<char>() + kBytes - 1, 1);
  EXPECT_THAT(device.violations(), SizeIs(2));
  device.synchronise(done);
  device.expect_writable(from.data(), kBytes);
  device.expect_readable(slot.data(), kBytes);
  EXPECT_THAT(device.violations(), IsEmpty());
}

TEST(FakeDevice, copies_outside_of_what_is_allocated_are_told) {
  FakeDevice device;
  const DeviceMemory host = filled(device, 1);
  DeviceMemory slot(device, kBytes, MemoryKind::device);
  const Stream stream(device);
  device.copy_async(slot.as<char>() + 1, host.data(), kBytes, kUp, stream);  // one byte too many
  EXPECT_THAT(device.violations(), Contains(HasSubstr("destination")));
  device.copy_async(slot.data(), host.data(), kBytes, CopyKind::device_to_device, stream);
  EXPECT_THAT(device.violations(), Contains(HasSubstr("source")));
  slot = {};
  EXPECT_THAT(device.violations(), Contains(HasSubstr("freed before the end of a copy")));
  device.synchronise(StreamHandle(stream));
}

/// A ring of two slots between a pinned staging buffer and a kernel, as the weight stream has it,
/// with one of its four waits left out.
enum class Missing { nothing, staging_free, slot_free, slot_filled, result };

std::vector<std::string> run_ring(std::uint32_t seed, Missing missing, std::vector<int>& sums) {
  FakeDevice device(seed);
  constexpr int kSlots = 2, kTiles = 12;
  std::vector<DeviceMemory> staging, slot;
  std::vector<Event> copied, used;
  for (int i = 0; i < kSlots; ++i) {
    staging.push_back(filled(device, 0));
    slot.emplace_back(device, kBytes, MemoryKind::device);
    copied.emplace_back(device);
    used.emplace_back(device);
  }
  const Stream copies(device), compute(device);
  sums.assign(kTiles, 0);
  for (int tile = 0; tile < kTiles; ++tile) {
    const auto i = static_cast<std::size_t>(tile % kSlots);
    if (missing != Missing::staging_free) device.synchronise(copied[i]);
    device.expect_writable(staging[i].data(), kBytes);
    std::memset(staging[i].data(), tile, kBytes);
    if (missing != Missing::slot_free) device.wait(copies, used[i]);
    device.copy_async(slot[i].data(), staging[i].data(), kBytes, kUp, copies);
    device.record(copied[i], copies);
    if (missing != Missing::slot_filled) device.wait(compute, copied[i]);
    int& sum = sums[static_cast<std::size_t>(tile)];
    device.run_async(
        {{slot[i].data(), kBytes}}, {{&sum, sizeof sum}},
        [&sum, data = slot[i].as<unsigned char>()] {
          for (std::int64_t b = 0; b < kBytes; ++b) sum += data[b];
        },
        compute);
    device.record(used[i], compute);
  }
  if (missing != Missing::result) device.synchronise(StreamHandle(compute));
  for (int& sum : sums) device.expect_readable(&sum, sizeof sum);
  device.synchronise(StreamHandle(copies));
  device.synchronise(StreamHandle(compute));
  return device.violations();
}

TEST(FakeDevice, a_ring_with_all_its_waits_is_right_and_one_without_any_of_them_is_told) {
  std::vector<int> sums;
  for (std::uint32_t seed = 0; seed < 30; ++seed) {
    EXPECT_THAT(run_ring(seed, Missing::nothing, sums), IsEmpty()) << seed;
    for (std::size_t tile = 0; tile < sums.size(); ++tile) {
      ASSERT_EQ(sums[tile], static_cast<int>(tile) * kBytes) << seed;
    }
#ifndef __SANITIZE_THREAD__  // these are the races it would rightly report
    for (const Missing missing :
         {Missing::staging_free, Missing::slot_free, Missing::slot_filled, Missing::result}) {
      EXPECT_THAT(run_ring(seed, missing, sums), testing::Not(IsEmpty()))
          << seed << " " << static_cast<int>(missing);
    }
#endif
  }
}

}  // namespace
}  // namespace tailor
