// This file writes the record: one JSON object a line, in the order in which things
// happened. The backends written in other languages write the same.
package main

import (
	"encoding/json"
	"log"
	"os"
	"sync/atomic"
	"time"
)

// line is one line of the record.
type line struct {
	Time  int64  `json:"time"`  // Unix time in nanoseconds
	Event string `json:"event"` // start, open, refused, text, binary or closed
	PID   int    `json:"pid"`
	// The connection: its number in this process, from 1, and what Holdfast calls it.
	Seq    int64  `json:"seq,omitempty"`
	Conn   string `json:"conn,omitempty"`
	Resume string `json:"resume,omitempty"` // Holdfast-Resume, if the request had one
	Text   string `json:"text,omitempty"`
	Binary []byte `json:"binary,omitempty"`
	// The peer's close code, 1006 if it sent no close frame; the status of a refusal.
	Code int `json:"code,omitempty"`
}

// record is the file. Its writes go to the kernel one by one, so that a process that
// is killed has recorded all that it has done.
type record struct {
	file *os.File
	last atomic.Int64 // number of the latest connection
}

// openRecord opens the file, of which several processes may have written a part, one
// after the other.
func openRecord(path string) (*record, error) {
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	r := &record{file: file}
	// A line that was cut short by a kill stays one of its own.
	if info, err := file.Stat(); err == nil && info.Mode().IsRegular() && info.Size() > 0 {
		end := make([]byte, 1)
		if _, err := file.ReadAt(end, info.Size()-1); err != nil {
			return nil, err
		}
		if end[0] != '\n' {
			if _, err := file.WriteString("\n"); err != nil {
				return nil, err
			}
		}
	}
	r.add(line{Event: "start"})
	return r, nil
}

// add appends a line. Without its record the process is of no use.
func (r *record) add(l line) {
	l.Time, l.PID = time.Now().UnixNano(), os.Getpid()
	p, err := json.Marshal(l)
	if err == nil {
		_, err = r.file.Write(append(p, '\n'))
	}
	if err != nil {
		log.Fatalf("writing record: %v", err)
	}
}
