#include "data/tokens/token_store.h"

#include <algorithm>
#include <bit>
#include <cerrno>
#include <numeric>

#include "base/error.h"
#include "base/text.h"
#include "data/tokens/hdf5.h"

namespace tailor {
namespace {

static_assert(std::endian::native == std::endian::little,
              "stores are little-endian, read in place");

constexpr const char* kFormat = "tailor token store";
constexpr std::int64_t kVersion = 1;

[[noreturn]] void damaged(const std::string& what, const fs::path& path) {
  throw Error(Fault::bad_file, {what, path.string(),
                                "Delete the store and its .json manifest, then run `tailor data "
                                "prepare` again: stores are made from the data."});
}

/// A dataset that is filled from front to back through a buffer.
template <class T>
class Column {
 public:
  Column(hid_t file, const char* name, hid_t disk_type, hid_t memory_type, std::size_t size,
         const fs::path& path)
      : path_(path), memory_type_(memory_type), size_(size) {
    const hsize_t dims[1] = {size};
    const hdf5::Handle space(H5Screate_simple(1, dims, nullptr), H5Sclose, "cannot write store",
                             path);
    const hdf5::Handle plist(H5Pcreate(H5P_DATASET_CREATE), H5Pclose, "cannot write store", path);
    // The same data give the same bytes: no times of day. Laid out in one piece, to be mapped.
    hdf5::check(H5Pset_obj_track_times(plist.get(), false), "cannot write store", path);
    hdf5::check(H5Pset_layout(plist.get(), H5D_CONTIGUOUS), "cannot write store", path);
    hdf5::check(H5Pset_alloc_time(plist.get(), H5D_ALLOC_TIME_EARLY), "cannot write store", path);
    hdf5::check(H5Pset_fill_time(plist.get(), H5D_FILL_TIME_NEVER), "cannot write store", path);
    set_ = std::make_unique<hdf5::Handle>(
        H5Dcreate2(file, name, disk_type, space.get(), H5P_DEFAULT, plist.get(), H5P_DEFAULT),
        H5Dclose, "cannot write store", path);
    buffer_.reserve(std::min(size, kBuffer));
  }

  void put(T value) {
    if (buffer_.size() == kBuffer) flush();
    buffer_.push_back(value);
  }

  void close() {
    flush();
    TAILOR_CHECK(written_ == size_);
    set_->close("cannot write store");
  }

 private:
  static constexpr std::size_t kBuffer = std::size_t{1} << 20U;

  void flush() {
    if (buffer_.empty()) return;
    const hsize_t start[1] = {written_};
    const hsize_t count[1] = {buffer_.size()};
    const hdf5::Handle memory(H5Screate_simple(1, count, nullptr), H5Sclose, "cannot write store",
                              path_);
    const hdf5::Handle space(H5Dget_space(set_->get()), H5Sclose, "cannot write store", path_);
    hdf5::check(H5Sselect_hyperslab(space.get(), H5S_SELECT_SET, start, nullptr, count, nullptr),
                "cannot write store", path_);
    hdf5::check(
        H5Dwrite(set_->get(), memory_type_, memory.get(), space.get(), H5P_DEFAULT, buffer_.data()),
        "cannot write store", path_);
    written_ += buffer_.size();
    buffer_.clear();
  }

  fs::path path_;
  hid_t memory_type_;
  std::size_t size_, written_ = 0;
  std::vector<T> buffer_;
  std::unique_ptr<hdf5::Handle> set_;
};

void write_text_attribute(hid_t file, const char* name, const std::string& text,
                          const fs::path& path) {
  const hdf5::Handle type(H5Tcopy(H5T_C_S1), H5Tclose, "cannot write store", path);
  hdf5::check(H5Tset_size(type.get(), text.size() + 1), "cannot write store", path);
  hdf5::check(H5Tset_cset(type.get(), H5T_CSET_UTF8), "cannot write store", path);
  const hdf5::Handle space(H5Screate(H5S_SCALAR), H5Sclose, "cannot write store", path);
  const hdf5::Handle attribute(
      H5Acreate2(file, name, type.get(), space.get(), H5P_DEFAULT, H5P_DEFAULT), H5Aclose,
      "cannot write store", path);
  hdf5::check(H5Awrite(attribute.get(), type.get(), text.c_str()), "cannot write store", path);
}

/// Dataset `name` after a check of its type and layout: in the map, or, where the library did not
/// align it (small ones may be put into gaps), in a copy.
template <class T>
std::span<const T> find_column(hid_t file, const char* name, hid_t disk_type, const MappedFile& map,
                               std::vector<std::vector<std::byte>>& copies) {
  const fs::path& path = map.path();
  const hdf5::Handle set(H5Dopen2(file, name, H5P_DEFAULT), H5Dclose, "cannot read store", path);
  const hdf5::Handle type(H5Dget_type(set.get()), H5Tclose, "cannot read store", path);
  const hdf5::Handle space(H5Dget_space(set.get()), H5Sclose, "cannot read store", path);
  hsize_t size = 0;
  const bool good = H5Tequal(type.get(), disk_type) > 0 &&
                    H5Sget_simple_extent_ndims(space.get()) == 1 &&
                    H5Sget_simple_extent_dims(space.get(), &size, nullptr) == 1;
  const haddr_t offset = good ? H5Dget_offset(set.get()) : HADDR_UNDEF;
  const auto bytes = map.bytes();
  if (!good || offset == HADDR_UNDEF || offset > bytes.size() ||
      size > (bytes.size() - offset) / sizeof(T)) {
    damaged(std::string("dataset '") + name + "' is not laid out as this version writes it", path);
  }
  const std::byte* begin = bytes.data() + offset;
  if (offset % alignof(T) != 0) {
    begin = copies.emplace_back(begin, begin + size * sizeof(T)).data();
  }
  return {reinterpret_cast<const T*>(begin), static_cast<std::size_t>(size)};
}

void check_offsets(std::span<const std::int64_t> offsets, std::int64_t end, const char* name,
                   const fs::path& path) {
  bool good = offsets.size() >= 2 && offsets.front() == 0 && offsets.back() == end;
  for (std::size_t i = 1; good && i < offsets.size(); ++i) good = offsets[i] > offsets[i - 1];
  if (!good)
    damaged(std::string("'") + name + "' does not ascend from 0 to the number of tokens", path);
}

}  // namespace

fs::path TokenStore::manifest_path(const fs::path& path) { return path.string() + ".json"; }

void write_token_store(const fs::path& path, const TokenStoreContent& content) {
  std::int64_t documents = 0, tokens = 0, trained_tokens = 0;
  for (const auto& row : content.rows) {
    TAILOR_CHECK(!row.empty());
    for (const std::int64_t document : row) {
      const auto size = content.document(document).ids.size();
      TAILOR_CHECK(size > 0);
      tokens += static_cast<std::int64_t>(size);
      ++documents;
    }
  }
  TAILOR_CHECK(documents > 0, "a store needs a document");
  if (path.has_parent_path()) make_folders(path.parent_path());

  Json manifest = content.manifest.is_object() ? content.manifest : Json::object();
  replace_atomically(path, [&](const fs::path& staging) {
    {
      const hdf5::Session session;
      const hdf5::Handle access(H5Pcreate(H5P_FILE_ACCESS), H5Pclose, "cannot write store", path);
      // Datasets on cache lines, so that they can be read in place; small ones are not pooled.
      hdf5::check(H5Pset_small_data_block_size(access.get(), 0), "cannot write store", path);
      hdf5::check(H5Pset_alignment(access.get(), 64, 64), "cannot write store", path);
      hdf5::Handle file(H5Fcreate(staging.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, access.get()),
                        H5Fclose, "cannot create store", path);
      const auto n = static_cast<std::size_t>(tokens);
      const auto d = static_cast<std::size_t>(documents);
      Column<std::int32_t> ids(file.get(), "ids", H5T_STD_I32LE, H5T_NATIVE_INT32, n, path);
      Column<std::uint8_t> trained(file.get(), "trained", H5T_STD_U8LE, H5T_NATIVE_UINT8, n, path);
      Column<std::int64_t> row_start(file.get(), "row_start", H5T_STD_I64LE, H5T_NATIVE_INT64,
                                     content.rows.size() + 1, path);
      Column<std::int64_t> document_start(file.get(), "document_start", H5T_STD_I64LE,
                                          H5T_NATIVE_INT64, d + 1, path);
      Column<std::int32_t> document_file(file.get(), "document_file", H5T_STD_I32LE,
                                         H5T_NATIVE_INT32, d, path);
      Column<std::int64_t> document_line(file.get(), "document_line", H5T_STD_I64LE,
                                         H5T_NATIVE_INT64, d, path);
      std::int64_t at = 0;
      for (const auto& row : content.rows) {
        row_start.put(at);
        for (const std::int64_t number : row) {
          const auto document = content.document(number);
          TAILOR_CHECK(document.trained.size() == document.ids.size());
          document_start.put(at);
          document_file.put(document.file);
          document_line.put(document.line);
          for (std::size_t i = 0; i < document.ids.size(); ++i) {
            const bool counts = i > 0 && document.trained[i] != 0;
            ids.put(document.ids[i]);
            trained.put(counts ? 1 : 0);
            trained_tokens += counts ? 1 : 0;
          }
          at += static_cast<std::int64_t>(document.ids.size());
        }
      }
      row_start.put(at);
      document_start.put(at);
      ids.close();
      trained.close();
      row_start.close();
      document_start.close();
      document_file.close();
      document_line.close();
      write_text_attribute(file.get(), "format", kFormat, path);
      write_text_attribute(file.get(), "provenance", manifest.dump(), path);
      file.close("cannot write store");
    }
    manifest["format"] = kFormat;
    manifest["version"] = kVersion;
    manifest["sha256"] = sha256_file(staging);
    manifest["bytes"] = fs::file_size(staging);
    manifest["rows"] = content.rows.size();
    manifest["documents"] = documents;
    manifest["tokens"] = tokens;
    manifest["trained_tokens"] = trained_tokens;
    manifest["sequence_len"] = content.sequence_len;
  });
  // Second, so that a manifest never speaks of a store that is not there yet. Between the two the
  // older manifest does not match, and the store is made again.
  write_atomically(TokenStore::manifest_path(path), manifest.dump(1) + "\n");
}

TokenStore TokenStore::open(const fs::path& path) {
  const fs::path manifest_file = manifest_path(path);
  if (!fs::exists(path)) throw io_error(ENOENT, "cannot open token store", path.string());
  if (!fs::exists(manifest_file)) {
    damaged("the token store has no manifest " + manifest_file.filename().string(), path);
  }
  Json manifest = read_json(manifest_file);
  const JsonReader reader(manifest, manifest_file.string());
  if (reader.text("format", "") != kFormat)
    damaged("this is not the manifest of a token store", manifest_file);
  if (reader.integer("version") != kVersion) {
    damaged("the token store has format version " + std::to_string(reader.integer("version")) +
                ", this program reads version " + std::to_string(kVersion),
            manifest_file);
  }
  std::error_code code;
  const auto bytes = static_cast<std::int64_t>(fs::file_size(path, code));
  if (code) throw io_error(code.value(), "cannot read token store", path.string());
  if (bytes != reader.integer("bytes")) {
    damaged("the token store has " + count_text(bytes) + " bytes, its manifest says " +
                count_text(reader.integer("bytes")),
            path);
  }
  if (sha256_file(path) != reader.text("sha256")) {
    damaged("the token store's SHA-256 is not the one of its manifest", path);
  }

  TokenStore store{MappedFile(path), std::move(manifest)};
  const JsonReader facts(store.manifest_, manifest_file.string());
  {
    const hdf5::Session session;
    const hdf5::Handle file(H5Fopen(path.c_str(), H5F_ACC_RDONLY, H5P_DEFAULT), H5Fclose,
                            "cannot open token store", path);
    const MappedFile& map = store.file_;
    store.ids_ = find_column<std::int32_t>(file.get(), "ids", H5T_STD_I32LE, map, store.copies_);
    store.trained_ =
        find_column<std::uint8_t>(file.get(), "trained", H5T_STD_U8LE, map, store.copies_);
    store.row_start_ =
        find_column<std::int64_t>(file.get(), "row_start", H5T_STD_I64LE, map, store.copies_);
    store.document_start_ =
        find_column<std::int64_t>(file.get(), "document_start", H5T_STD_I64LE, map, store.copies_);
    store.document_file_ =
        find_column<std::int32_t>(file.get(), "document_file", H5T_STD_I32LE, map, store.copies_);
    store.document_line_ =
        find_column<std::int64_t>(file.get(), "document_line", H5T_STD_I64LE, map, store.copies_);
  }
  store.sequence_len_ = facts.integer("sequence_len");
  store.trained_tokens_ = facts.integer("trained_tokens");
  check_offsets(store.row_start_, store.tokens(), "row_start", path);
  check_offsets(store.document_start_, store.tokens(), "document_start", path);
  const bool same = store.trained_.size() == store.ids_.size() &&
                    store.document_file_.size() + 1 == store.document_start_.size() &&
                    store.document_line_.size() + 1 == store.document_start_.size() &&
                    facts.integer("rows") == store.rows() &&
                    facts.integer("tokens") == store.tokens() &&
                    std::includes(store.document_start_.begin(), store.document_start_.end(),
                                  store.row_start_.begin(), store.row_start_.end());
  if (!same) damaged("the token store's datasets do not fit together", path);
  for (std::size_t row = 1; row < store.row_start_.size(); ++row) {
    if (store.row_start_[row] - store.row_start_[row - 1] > store.sequence_len_) {
      damaged("row " + std::to_string(row - 1) + " is longer than sequence_len", path);
    }
  }
  return store;
}

}  // namespace tailor
