// This file tests which buffer a Reader holds when, how it meets errors of its
// source, and what frames cost.

package frame

import (
	"bytes"
	"errors"
	"io"
	"testing"

	"github.com/gobwas/ws"
)

// steps is a source that gives one step at every Read.
type steps []step

type step struct {
	b   []byte
	err error
}

func (s *steps) Read(p []byte) (int, error) {
	if len(*s) == 0 {
		return 0, io.EOF
	}
	first := &(*s)[0]
	n := copy(p, first.b)
	if first.b = first.b[n:]; len(first.b) > 0 {
		return n, nil
	}
	err := first.err
	*s = (*s)[1:]
	return n, err
}

func drain(t *testing.T, r *Reader) (n int) {
	t.Helper()
	for {
		u, err := r.Next()
		if err != nil {
			t.Fatalf("got error %v, want none", err)
		}
		if u == nil {
			return n
		}
		n += len(u.Wire)
	}
}

func TestIdleReaderHoldsNoPooledBuffer(t *testing.T) {
	large := Append(nil, ws.OpBinary, make([]byte, 200000), true)
	small := Append(nil, ws.OpText, []byte("hello"), true)
	middle := Append(nil, ws.OpText, make([]byte, 2000), true)
	for _, test := range []struct {
		name   string
		stream []byte
	}{
		{"small", small},
		{"middle", middle},
		{"large", large},
		{"large and small", append(bytes.Clone(large), small...)},
		{"many small", bytes.Repeat(small, 10000)},
		{"large in two frames", func() []byte {
			a := Append(nil, ws.OpBinary, make([]byte, 100000), true)
			a[0] &^= 0x80
			b := Append(nil, ws.OpContinuation, make([]byte, 100000), true)
			return append(a, b...)
		}()},
	} {
		t.Run(test.name, func(t *testing.T) {
			var r Reader
			r.Init(true, false)
			asleep := errors.New("nothing to read")
			src := &steps{{test.stream, nil}, {nil, asleep}}
			got := 0
			for {
				err := r.Fill(readerFunc(func(p []byte) (int, error) {
					if r.Buffered() == 0 && !inMessage(&r) && r.large != nil {
						t.Error("waiting between messages with a pooled buffer")
					}
					return src.Read(p)
				}))
				if errors.Is(err, asleep) {
					break
				}
				if err != nil {
					t.Fatalf("got error %v, want none", err)
				}
				got += drain(t, &r)
			}
			if got < len(test.stream) {
				t.Fatalf("got %d bytes, want %d at least", got, len(test.stream))
			}
			if r.large != nil {
				t.Error("got a pooled buffer held while idle, want none")
			}
		})
	}
}

type readerFunc func(p []byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// A large message is received in the large buffer from its second read on, not
// 500 bytes at a time.
func TestLargeFramesAreReadInLargePieces(t *testing.T) {
	var r Reader
	r.Init(false, false)
	src := bytes.NewReader(Append(nil, ws.OpBinary, make([]byte, 600000), false))
	reads := 0
	for ; ; reads++ {
		if err := r.Fill(src); err != nil {
			break
		}
		drain(t, &r)
	}
	if reads > 12 {
		t.Errorf("got %d reads for 600000 bytes, want about 9", reads)
	}
}

func TestReleaseIsHarmlessAtAnyTime(t *testing.T) {
	var r Reader
	r.Release()
	r.Init(true, false)
	stream := Append(nil, ws.OpBinary, make([]byte, 50000), true)
	if err := r.Fill(bytes.NewReader(stream[:20])); err != nil {
		t.Fatal(err)
	}
	drain(t, &r)
	if err := r.Fill(bytes.NewReader(stream[20:])); err != nil {
		t.Fatal(err)
	}
	if r.large == nil {
		t.Fatal("got no pooled buffer inside a large frame, want one: the test is void")
	}
	r.Release()
	r.Release()
	if r.large != nil || r.Buffered() != 0 {
		t.Errorf("got large %v and %d bytes buffered after Release, want none", r.large != nil, r.Buffered())
	}
	r.Init(false, false)
	if err := r.Fill(bytes.NewReader([]byte{0x81, 1, 'x'})); err != nil {
		t.Fatal(err)
	}
	if n := drain(t, &r); n != 3 {
		t.Errorf("got %d bytes after Init, want the frame of 3", n)
	}
}

func TestPreload(t *testing.T) {
	for _, size := range []int{0, 1, smallBuffer - headroom, smallBuffer - headroom + 1, 4096, 65536} {
		stream := bytes.Repeat(Append(nil, ws.OpText, make([]byte, 60), true), size/66+1)
		var r Reader
		r.Init(true, false)
		r.Preload(stream[:size])
		if r.Buffered() != size {
			t.Errorf("got %d bytes buffered, want %d", r.Buffered(), size)
		}
		units, err := collect(t, &r, bytes.NewReader(stream[size:]))
		if err != nil || !bytes.Equal(wire(units), stream) {
			t.Errorf("%d early bytes: got %d bytes of %d, error %v", size, len(wire(units)), len(stream), err)
		}
	}
}

// A Read may return bytes and an error; a timeout is no end.
func TestFillKeepsBytesThatComeWithAnError(t *testing.T) {
	timeout := errors.New("timeout")
	frame := Append(nil, ws.OpText, []byte("hello"), false)
	src := &steps{{frame[:3], timeout}, {frame[3:], timeout}, {nil, timeout}, {frame, io.EOF}}
	var r Reader
	r.Init(false, false)
	for i, want := range []struct {
		err error
		n   int
	}{{timeout, 0}, {timeout, len(frame)}, {timeout, 0}, {nil, len(frame)}, {io.EOF, 0}, {io.EOF, 0}} {
		err := r.Fill(src)
		if n := drain(t, &r); !errors.Is(err, want.err) || n != want.n {
			t.Errorf("read %d: got %d bytes, error %v, want %d, %v", i, n, err, want.n, want.err)
		}
	}
}

func TestUnmaskedLeavesTheWireAlone(t *testing.T) {
	frame := Append(nil, ws.OpPing, []byte("payload"), true)
	var r Reader
	r.Init(true, false)
	if err := r.Fill(bytes.NewReader(frame)); err != nil {
		t.Fatal(err)
	}
	u, err := r.Next()
	if u == nil || err != nil {
		t.Fatalf("got %v, error %v, want the ping", u, err)
	}
	if got := string(u.Unmasked()); got != "payload" {
		t.Errorf("got %q, want the payload", got)
	}
	if !bytes.Equal(u.Wire, frame) {
		t.Error("got changed wire bytes, want them as they came")
	}
}

func TestSmallFramesDoNotAllocate(t *testing.T) {
	var r Reader
	r.Init(true, false)
	src := &endless{b: bytes.Repeat(Append(nil, ws.OpText, make([]byte, 64), true), 16)}
	if n := testing.AllocsPerRun(1000, func() {
		_ = r.Fill(src)
		for {
			if u, _ := r.Next(); u == nil {
				return
			}
		}
	}); n != 0 {
		t.Errorf("got %v allocations for each Fill, want none", n)
	}
}

// endless repeats its bytes.
type endless struct {
	b  []byte
	at int
}

func (e *endless) Read(p []byte) (int, error) {
	n := copy(p, e.b[e.at:])
	e.at = (e.at + n) % len(e.b)
	return n, nil
}

func BenchmarkReader(b *testing.B) {
	for _, bench := range []struct {
		name string
		size int
	}{{"64B", 64}, {"4KiB", 4 << 10}, {"1MiB", 1 << 20}} {
		b.Run(bench.name, func(b *testing.B) {
			wire := Append(nil, ws.OpBinary, make([]byte, bench.size), true)
			src := &endless{b: bytes.Repeat(wire, 1+4096/len(wire))}
			var r Reader
			r.Init(true, false)
			b.SetBytes(int64(bench.size))
			b.ReportAllocs()
			for b.Loop() {
				for {
					u, err := r.Next()
					if err != nil {
						b.Fatal(err)
					}
					if u != nil && u.Last {
						break
					}
					if u == nil {
						_ = r.Fill(src)
					}
				}
			}
		})
	}
}
