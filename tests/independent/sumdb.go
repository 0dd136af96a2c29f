// Verifies a log with the packages of Go's checksum database, golang.org/x/mod/sumdb/note and .../tlog.
//
// It reads one JSON request from stdin: the log's folder, its verifier key, entries and pairs of sizes with the proofs
// that the log's own code made. It proves each of them again from the log's tiles. Exit codes: 0 verified, with the
// counts as JSON; 1 not verified, with the reason on stderr; 2 the request is not one.
package main

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

type record struct {
	Index int64            `json:"index"`
	Proof tlog.RecordProof `json:"proof"`
}

type pair struct {
	Old     int64          `json:"old"`
	OldRoot tlog.Hash      `json:"old_root"`
	New     int64          `json:"new"`
	NewRoot tlog.Hash      `json:"new_root"`
	Proof   tlog.TreeProof `json:"proof"`
}

type request struct {
	Log     string   `json:"log"`
	Vkey    string   `json:"vkey"`
	Records []record `json:"records"`
	Pairs   []pair   `json:"pairs"`
}

// folder is a tlog.TileReader over the files of a log: C2SP tlog-tiles leaves the height, always 8, out of the path.
type folder string

func (f folder) Height() int { return 8 }

func (f folder) SaveTiles([]tlog.Tile, [][]byte) {}

func (f folder) ReadTiles(tiles []tlog.Tile) ([][]byte, error) {
	var found [][]byte
	for _, tile := range tiles {
		data, err := os.ReadFile(filepath.Join(string(f), strings.Replace(tile.Path(), "tile/8/", "tile/", 1)))
		if err != nil {
			return nil, err
		}
		found = append(found, data)
	}
	return found, nil
}

// entry reads the entry at an index out of its bundle: entries behind their lengths, two bytes each.
func (f folder) entry(index, size int64) ([]byte, error) {
	tile := tlog.Tile{H: 8, L: -1, N: index / 256, W: 256}
	if (tile.N+1)*256 > size {
		tile.W = int(size - tile.N*256)
	}
	path := strings.Replace(tile.Path(), "tile/8/data", "tile/entries", 1)
	data, err := os.ReadFile(filepath.Join(string(f), path))
	if err != nil {
		return nil, err
	}
	for left := index % 256; ; left-- {
		if len(data) < 2 || len(data) < 2+int(binary.BigEndian.Uint16(data)) {
			return nil, errors.New("the bundle ends inside an entry")
		}
		end := 2 + int(binary.BigEndian.Uint16(data))
		if left == 0 {
			return data[2:end], nil
		}
		data = data[end:]
	}
}

// checkpoint opens the signed note and parses its tree; only the first line differs from a checksum database's.
func checkpoint(asked request) (tree tlog.Tree, err error) {
	verifier, err := note.NewVerifier(asked.Vkey)
	if err != nil {
		return tree, err
	}
	data, err := os.ReadFile(filepath.Join(asked.Log, "checkpoint"))
	if err != nil {
		return tree, err
	}
	opened, err := note.Open(data, note.VerifierList(verifier))
	if err != nil {
		return tree, err
	}
	if !strings.HasPrefix(opened.Text, verifier.Name()+"\n") {
		return tree, errors.New("the origin is not the key's name")
	}
	text := strings.TrimPrefix(opened.Text, verifier.Name()+"\n")
	return tlog.ParseTree([]byte("go.sum database tree\n" + text))
}

func checkRecord(asked record, tree tlog.Tree, files folder, hashes tlog.HashReader) error {
	data, err := files.entry(asked.Index, tree.N)
	if err != nil {
		return err
	}
	own, err := tlog.ProveRecord(tree.N, asked.Index, hashes)
	if err != nil {
		return err
	}
	for _, proof := range []tlog.RecordProof{own, asked.Proof} {
		if err := tlog.CheckRecord(proof, tree.N, tree.Hash, asked.Index, tlog.RecordHash(data)); err != nil {
			return err
		}
	}
	return nil
}

func checkPair(asked pair, hashes tlog.HashReader) error {
	for size, root := range map[int64]tlog.Hash{asked.Old: asked.OldRoot, asked.New: asked.NewRoot} {
		found, err := tlog.TreeHash(size, hashes)
		if err != nil {
			return err
		}
		if found != root {
			return fmt.Errorf("the tiles give another root of size %d", size)
		}
	}
	own, err := tlog.ProveTree(asked.New, asked.Old, hashes)
	if err != nil {
		return err
	}
	for _, proof := range []tlog.TreeProof{own, asked.Proof} {
		if err := tlog.CheckTree(proof, asked.New, asked.NewRoot, asked.Old, asked.OldRoot); err != nil {
			return err
		}
	}
	return nil
}

func verify(asked request) (tlog.Tree, error) {
	tree, err := checkpoint(asked)
	if err != nil {
		return tree, fmt.Errorf("checkpoint: %w", err)
	}
	files := folder(asked.Log)
	hashes := tlog.TileHashReader(tree, files)
	for _, record := range asked.Records {
		if err := checkRecord(record, tree, files, hashes); err != nil {
			return tree, fmt.Errorf("entry %d: %w", record.Index, err)
		}
	}
	for _, pair := range asked.Pairs {
		if err := checkPair(pair, hashes); err != nil {
			return tree, fmt.Errorf("sizes %d and %d: %w", pair.Old, pair.New, err)
		}
	}
	return tree, nil
}

func main() {
	var asked request
	if err := json.NewDecoder(os.Stdin).Decode(&asked); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	tree, err := verify(asked)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Printf(`{"size":%d,"records":%d,"pairs":%d}`+"\n", tree.N, len(asked.Records), len(asked.Pairs))
}
