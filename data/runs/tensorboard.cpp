#include "data/runs/tensorboard.h"

#include <unistd.h>

#include <array>
#include <atomic>
#include <bit>
#include <utility>

namespace tailor {
namespace {

constexpr std::array<std::uint32_t, 256> make_crc_table() {
  std::array<std::uint32_t, 256> table{};
  for (std::uint32_t i = 0; i < 256; ++i) {
    std::uint32_t crc = i;
    for (int bit = 0; bit < 8; ++bit) crc = (crc & 1U) != 0 ? 0x82F63B78U ^ (crc >> 1U) : crc >> 1U;
    table[i] = crc;
  }
  return table;
}
constexpr std::array<std::uint32_t, 256> kCrcTable = make_crc_table();

/// Little-endian bytes of an unsigned integer.
template <class Unsigned>
std::string little_endian(Unsigned value) {
  std::string out;
  for (std::size_t i = 0; i < sizeof value; ++i) {
    out += static_cast<char>(static_cast<unsigned char>(value >> (8 * i)));
  }
  return out;
}

/// A protocol-buffers message, field by field. Wire types: 0 varint, 1 eight bytes, 2 counted
/// bytes, 5 four bytes.
class Message {
 public:
  Message& integer(unsigned field, std::int64_t value) {
    varint(field << 3U);
    varint(static_cast<std::uint64_t>(value));
    return *this;
  }
  Message& real(unsigned field, double value) {
    varint(field << 3U | 1U);
    bytes_ += little_endian(std::bit_cast<std::uint64_t>(value));
    return *this;
  }
  Message& real32(unsigned field, float value) {
    varint(field << 3U | 5U);
    bytes_ += little_endian(std::bit_cast<std::uint32_t>(value));
    return *this;
  }
  Message& bytes(unsigned field, std::string_view value) {
    varint(field << 3U | 2U);
    varint(value.size());
    bytes_ += value;
    return *this;
  }
  Message& message(unsigned field, const Message& value) { return bytes(field, value.bytes_); }
  const std::string& encoded() const { return bytes_; }

 private:
  void varint(std::uint64_t value) {
    for (; value > 0x7F; value >>= 7U) bytes_ += static_cast<char>((value & 0x7FU) | 0x80U);
    bytes_ += static_cast<char>(value);
  }
  std::string bytes_;
};

// Field numbers: tensorflow/core/util/event.proto, framework/summary.proto, framework/tensor.proto.
constexpr unsigned kEventWallTime = 1, kEventStep = 2, kEventFileVersion = 3, kEventSummary = 5,
                   kEventSessionLog = 7;
constexpr unsigned kSummaryValue = 1;
constexpr unsigned kValueTag = 1, kValueSimple = 2, kValueTensor = 8, kValueMetadata = 9;
constexpr unsigned kTensorType = 1, kTensorShape = 2, kTensorStrings = 8;
constexpr std::int64_t kTensorOfStrings = 7;
constexpr std::int64_t kSessionStart = 1;

std::string host_name() {
  std::array<char, 256> name{};
  return ::gethostname(name.data(), name.size() - 1) == 0 ? std::string(name.data()) : "unknown";
}

}  // namespace

std::uint32_t crc32c(std::string_view bytes) {
  std::uint32_t crc = ~0U;
  for (const char c : bytes) {
    crc = kCrcTable[(crc ^ static_cast<unsigned char>(c)) & 0xFFU] ^ (crc >> 8U);
  }
  return ~crc;
}

std::uint32_t masked_crc32c(std::string_view bytes) {
  return std::rotr(crc32c(bytes), 15) + 0xA282EAD8U;
}

TensorboardWriter::TensorboardWriter(const fs::path& folder, const Clock& clock,
                                     std::int64_t resumed_from_step)
    : clock_(clock) {
  static std::atomic<int> count{0};
  path_ = folder / ("events.out.tfevents." + std::to_string(clock.unix_ms() / 1000) + "." +
                    host_name() + "." + std::to_string(::getpid()) + "." + std::to_string(count++));
  file_ = std::make_unique<FileWriter>(path_);
  record(Message().real(kEventWallTime, now()).bytes(kEventFileVersion, "brain.Event:2").encoded());
  if (resumed_from_step > 0) {  // drops older files' points from this step on
    record(Message()
               .real(kEventWallTime, now())
               .integer(kEventStep, resumed_from_step + 1)
               .message(kEventSessionLog, Message().integer(1, kSessionStart))
               .encoded());
  }
  flush();
}

void TensorboardWriter::scalar(std::string_view tag, double value, std::int64_t step) {
  const Message one =
      Message().bytes(kValueTag, tag).real32(kValueSimple, static_cast<float>(value));
  record(Message()
             .real(kEventWallTime, now())
             .integer(kEventStep, step)
             .message(kEventSummary, Message().message(kSummaryValue, one))
             .encoded());
}

void TensorboardWriter::text(std::string_view tag, std::string_view markdown, std::int64_t step) {
  const Message metadata = Message().message(1, Message().bytes(1, "text"));
  const Message shape = Message().message(2, Message().integer(1, 1));
  const Message tensor = Message()
                             .integer(kTensorType, kTensorOfStrings)
                             .message(kTensorShape, shape)
                             .bytes(kTensorStrings, markdown);
  const Message one = Message()
                          .bytes(kValueTag, std::string(tag) + "/text_summary")
                          .message(kValueTensor, tensor)
                          .message(kValueMetadata, metadata);
  record(Message()
             .real(kEventWallTime, now())
             .integer(kEventStep, step)
             .message(kEventSummary, Message().message(kSummaryValue, one))
             .encoded());
}

void TensorboardWriter::flush() { file_->flush(); }

void TensorboardWriter::record(std::string_view event) {
  const std::string length = little_endian(static_cast<std::uint64_t>(event.size()));
  file_->write(length);
  file_->write(little_endian(masked_crc32c(length)));
  file_->write(event);
  file_->write(little_endian(masked_crc32c(event)));
}

double TensorboardWriter::now() const { return static_cast<double>(clock_.unix_ms()) / 1000; }

}  // namespace tailor
