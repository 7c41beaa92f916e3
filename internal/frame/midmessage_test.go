package frame

import (
	"bytes"
	"strings"
	"testing"

	"github.com/gobwas/ws"
)

// A message is under way from its first unit to its last one: also when its frame is
// handed out in parts, and whatever control frames come in between.
func TestMidMessage(t *testing.T) {
	frame := func(op ws.OpCode, fin bool, payload string) []byte {
		f := ws.NewFrame(op, fin, []byte(payload))
		return ws.MustCompileFrame(f)
	}
	long := strings.Repeat("x", 100_000)
	for _, test := range []struct {
		name string
		wire [][]byte
		want []bool // after each unit
	}{
		{"whole", [][]byte{frame(ws.OpText, true, "a"), frame(ws.OpBinary, true, "")}, []bool{false, false}},
		{"fragments", [][]byte{frame(ws.OpText, false, "a"), frame(ws.OpContinuation, false, ""), frame(ws.OpContinuation, true, "b")}, []bool{true, true, false}},
		{"control frames between", [][]byte{
			frame(ws.OpPing, true, ""), frame(ws.OpText, false, "a"), frame(ws.OpPing, true, "p"), frame(ws.OpPong, true, ""),
			frame(ws.OpContinuation, true, "b"), frame(ws.OpPong, true, ""),
		}, []bool{false, true, true, true, false, false}},
		{"close in the middle", [][]byte{frame(ws.OpText, false, "a"), frame(ws.OpClose, true, "\x03\xe8")}, []bool{true, true}},
		{"empty fragments", [][]byte{frame(ws.OpText, false, ""), frame(ws.OpContinuation, true, "")}, []bool{true, false}},
	} {
		t.Run(test.name, func(t *testing.T) {
			var r Reader
			r.Init(false, false)
			if r.MidMessage() {
				t.Error("got a message under way before the first byte")
			}
			src := bytes.NewReader(bytes.Join(test.wire, nil))
			var got []bool
			for {
				u, err := r.Next()
				if err != nil {
					t.Fatal(err)
				}
				if u != nil {
					got = append(got, r.MidMessage())
					if u.Data() && u.Last == r.MidMessage() {
						t.Errorf("unit %d: got the last one %t, and under way %t", len(got), u.Last, r.MidMessage())
					}
					continue
				}
				before := r.MidMessage()
				if r.Fill(src) != nil {
					break
				}
				if r.MidMessage() != before {
					t.Error("got another answer because bytes came, want it about what was handed out")
				}
			}
			if len(got) != len(test.want) {
				t.Fatalf("got %d units, want %d", len(got), len(test.want))
			}
			for i := range got {
				if got[i] != test.want[i] {
					t.Errorf("after unit %d: got %t, want %t", i+1, got[i], test.want[i])
				}
			}
			r.Release()
		})
	}
	t.Run("a frame in parts", func(t *testing.T) {
		var r Reader
		r.Init(false, false)
		src := bytes.NewReader(frame(ws.OpBinary, true, long))
		units := 0
		for {
			u, err := r.Next()
			if err != nil {
				t.Fatal(err)
			}
			if u == nil {
				if r.Fill(src) != nil {
					break
				}
				continue
			}
			if units++; r.MidMessage() == u.Last {
				t.Fatalf("unit %d: got the last one %t, and under way %t", units, u.Last, r.MidMessage())
			}
		}
		if units < 2 || r.MidMessage() {
			t.Errorf("got %d units, under way %t after all; want several, and not", units, r.MidMessage())
		}
		r.Release()
	})
}
