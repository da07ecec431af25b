#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <map>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/file.h"
#include "base/json.h"
#include "base/units.h"
#include "data/checkpoint/checkpoint.h"
#include "data/quant/codec.h"
#include "data/store/export.h"
#include "data/store/pack.h"

namespace tailor::testing_support {

constexpr FormatChoice int4_of(std::int64_t group = 0) { return {false, WeightKind::int4, group}; }
constexpr FormatChoice as(WeightKind kind) { return {false, kind, 0}; }

/// A folder of the test's own, gone afterwards, with a store and its export in it.
class ExportTest : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::path(testing::TempDir()) /
              ("tailor_export_" + std::to_string(::getpid()) + "_" +
               testing::UnitTest::GetInstance()->current_test_info()->name());
    fs::remove_all(folder_);
    make_folders(folder_);
  }
  void TearDown() override { fs::remove_all(folder_); }

  fs::path made() const { return folder_ / "made"; }  ///< a model of the test's own
  fs::path store() const { return folder_ / "store"; }
  fs::path out() const { return folder_ / "out"; }
  static fs::path golden(const std::string& name) {
    return fs::path(TAILOR_SOURCE_DIR) / "tests/golden" / name / "model";
  }

  void pack(const fs::path& model, FormatChoice experts = {}, FormatChoice others = {}) const {
    pack_into(model, store(), experts, others);
  }
  static void pack_into(const fs::path& model, const fs::path& to, FormatChoice experts = {},
                        FormatChoice others = {}) {
    PackOptions options;
    options.formats = {experts, others};
    options.source = "test";
    static_cast<void>(pack_store(model, to, options));
  }
  ExportReport export_to(const fs::path& to, const ExportOptions& options = {}) const {
    return export_store(Store::open(store()), to, options);
  }
  static ExportOptions bfloat16() {
    ExportOptions options;
    options.bfloat16 = true;
    return options;
  }

  static std::vector<std::byte> unit_bytes(const Store& store, const StoredUnit& unit) {
    std::vector<std::byte> out(static_cast<std::size_t>(unit.bytes));
    std::ifstream file(store.path_of(unit), std::ios::binary);
    file.seekg(unit.offset);
    file.read(reinterpret_cast<char*>(out.data()), unit.bytes);
    EXPECT_TRUE(file.good()) << store.where(unit);
    return out;
  }

  /// Every matrix of a store, decoded: by unit and role.
  static std::map<std::string, std::vector<float>> decoded(const fs::path& folder) {
    const Store store = Store::open(folder);
    std::map<std::string, std::vector<float>> out;
    for (const StoredUnit& unit : store.layout().units) {
      const auto bytes = unit_bytes(store, unit);
      for (const MatrixPlace& place : unit.matrices) {
        std::vector<float> values(static_cast<std::size_t>(place.rows * place.columns));
        decode_rows(place.in(bytes.data()), 0, place.rows, values.data());
        out[unit_text(unit.id) + " " + role_name(place.role)] = std::move(values);
      }
    }
    return out;
  }
  static void expect_same(const std::map<std::string, std::vector<float>>& a,
                          const std::map<std::string, std::vector<float>>& b) {
    ASSERT_EQ(a.size(), b.size());
    for (const auto& [name, values] : a) {
      ASSERT_EQ(b.count(name), 1U) << name;
      const auto& others = b.at(name);
      ASSERT_EQ(values.size(), others.size()) << name;
      EXPECT_EQ(std::memcmp(values.data(), others.data(), values.size() * sizeof(float)), 0)
          << name;
    }
  }
  /// Packing the export as it is gives the store's numbers again.
  void expect_round_trip() const {
    pack_into(out(), folder_ / "again");
    expect_same(decoded(store()), decoded(folder_ / "again"));
  }

  static std::string bytes_of(const Checkpoint& checkpoint, const std::string& name) {
    const auto bytes = checkpoint.bytes(checkpoint.find(name));
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
  }
  /// "BF16 [8, 64]"
  static std::string form_of(const Checkpoint& checkpoint, const std::string& name) {
    if (!checkpoint.has(name)) return "none";
    const TensorInfo& info = checkpoint.find(name).info;
    return std::string(dtype_name(info.dtype)) + " " + info.shape_text();
  }
  static std::vector<std::string> names_in(const fs::path& folder) {
    std::vector<std::string> out;
    for (const auto& entry : fs::directory_iterator(folder)) {
      out.push_back(entry.path().filename().string());
    }
    std::sort(out.begin(), out.end());
    return out;
  }
  static Json quantization(const fs::path& folder) {
    const Json config = read_json(folder / "config.json");
    return config.contains("quantization_config") ? config["quantization_config"] : Json();
  }

  fs::path folder_;
};

template <class Body>
Error error_of(const Body& body) {
  try {
    body();
  } catch (const Error& error) {
    return error;
  }
  ADD_FAILURE() << "no error";
  return {Fault::internal, {"no error", "", ""}};
}

}  // namespace tailor::testing_support
