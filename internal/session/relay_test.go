// This file tests what passes between the peers while both are there.

package session

import (
	"bytes"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gobwas/ws"

	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
)

// ways are the two directions of a session.
var ways = map[string]func(r *rig) (from, to *peer){
	"client to backend": func(r *rig) (*peer, *peer) { return r.client, r.backend },
	"backend to client": func(r *rig) (*peer, *peer) { return r.backend, r.client },
}

// bothWays runs a test in a bubble of its own for each direction.
func bothWays(t *testing.T, with setup, test func(t *testing.T, r *rig, from, to *peer)) {
	for name, way := range ways {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := start(t, with)
				from, to := way(r)
				test(t, r, from, to)
			})
		})
	}
}

func TestFramesPassAsTheyAre(t *testing.T) {
	const rsv1 = 4
	for _, test := range []struct {
		name   string
		frames func(p *peer) [][]byte
	}{
		{"text", func(p *peer) [][]byte { return [][]byte{p.text("hello")} }},
		{"binary", func(p *peer) [][]byte { return [][]byte{p.binary(300)} }},
		{"no payload", func(p *peer) [][]byte { return [][]byte{p.text(""), p.binary(0), p.text("")} }},
		{"many", func(p *peer) (all [][]byte) {
			for i := range 100 {
				all = append(all, p.binary(i))
			}
			return all
		}},
		{"fragments, one empty, with control frames between", func(p *peer) [][]byte {
			return [][]byte{
				p.frame(false, 0, ws.OpText, []byte("one")),
				p.frame(true, 0, ws.OpPing, []byte("ping of the peer")),
				p.frame(false, 0, ws.OpContinuation, nil),
				p.frame(true, 0, ws.OpPong, []byte("unasked")),
				p.frame(true, 0, ws.OpContinuation, []byte("two")),
			}
		}},
		{"compressed", func(p *peer) [][]byte {
			return [][]byte{p.frame(false, rsv1, ws.OpBinary, []byte("not")), p.frame(true, 0, ws.OpContinuation, []byte(" inflated"))}
		}},
		{"length in 16 bits", func(p *peer) [][]byte { return [][]byte{p.binary(126), p.binary(15000)} }},
	} {
		t.Run(test.name, func(t *testing.T) {
			quiet := manners{mute: true}
			bothWays(t, setup{compressed: true, client: quiet, backend: quiet}, func(t *testing.T, r *rig, from, to *peer) {
				frames := test.frames(from)
				for pieces, send := range map[string]func(){
					"frame by frame": func() { from.send(frames...) },
					"at once":        func() { from.send(bytes.Join(frames, nil)) },
					"byte by byte": func() {
						for b := range slices.Chunk(bytes.Join(frames, nil), 1) {
							from.send(b)
							if len(frames) < 10 {
								synctest.Wait()
							}
						}
					},
				} {
					before := len(to.wire())
					send()
					synctest.Wait()
					if got, want := to.wire()[before:], bytes.Join(frames, nil); !bytes.Equal(got, want) {
						t.Errorf("%s: got %d bytes\n%x\nwant %d\n%x", pieces, len(got), got, len(want), want)
					}
				}
				if got := from.wire(); len(got) != 0 {
					t.Errorf("got %d bytes back, want none", len(got))
				}
			})
		})
	}
}

func TestFramesLargerThanTheBuffersPassInFragments(t *testing.T) {
	bothWays(t, setup{buffer: 4 << 10}, func(t *testing.T, r *rig, from, to *peer) {
		sizes := []int{1 << 20, 0, 100_000, 65536, 5, 70_000}
		want := make([]string, len(sizes))
		for i, size := range sizes {
			want[i] = strings.Repeat(string(rune('a'+i)), size)
			from.send(from.text(want[i]))
		}
		synctest.Wait()
		got, frames := to.messages()
		if !slices.Equal(got, want) {
			t.Errorf("got %d messages, want the %d sent, unchanged", len(got), len(want))
		}
		if most := (1<<20)/(16<<10) + len(sizes)*6; frames > most {
			t.Errorf("got %d frames, want at most %d: fragments of 16 KiB", frames, most)
		}
	})
}

func TestBytesAreThePayloadOfData(t *testing.T) {
	for _, test := range []struct {
		name            string
		frames          func(p *peer) [][]byte
		bytes, messages uint64
	}{
		{"two messages", func(p *peer) [][]byte { return [][]byte{p.text("12345"), p.binary(1000)} }, 1005, 2},
		{"empty message", func(p *peer) [][]byte { return [][]byte{p.text("")} }, 0, 1},
		{"fragments are one message", func(p *peer) [][]byte {
			return [][]byte{p.frame(false, 0, ws.OpText, []byte("ab")), p.frame(true, 0, ws.OpContinuation, []byte("c"))}
		}, 3, 1},
		{"unfinished message", func(p *peer) [][]byte { return [][]byte{p.frame(false, 0, ws.OpText, []byte("ab"))} }, 2, 0},
		{"larger than the buffers", func(p *peer) [][]byte { return [][]byte{p.binary(500_000)} }, 500_000, 1},
		{"control frames are no data", func(p *peer) [][]byte {
			return [][]byte{p.frame(true, 0, ws.OpPing, []byte("ping")), p.frame(true, 0, ws.OpPong, []byte("pong"))}
		}, 0, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			bothWays(t, setup{}, func(t *testing.T, r *rig, from, to *peer) {
				from.send(test.frames(from)...)
				synctest.Wait()
				v := r.rec.View()
				got := [4]uint64{v.BytesIn, v.MessagesIn, v.BytesOut, v.MessagesOut}
				want := [4]uint64{test.bytes, test.messages}
				if from == r.backend {
					want = [4]uint64{2: test.bytes, 3: test.messages}
				}
				if got != want {
					t.Errorf("got bytes and messages in %d %d, out %d %d; want %v", got[0], got[1], got[2], got[3], want)
				}
			})
		})
	}
}

func TestWhatCameWithTheHandshakeIsPassedOnAtOnce(t *testing.T) {
	for name, early := range map[string]func(p *peer) []byte{
		"a message":        func(p *peer) []byte { return p.text("early") },
		"several messages": func(p *peer) []byte { return slices.Concat(p.text("1"), p.text("2"), p.binary(5000)) },
		"a ping":           func(p *peer) []byte { return p.frame(true, 0, ws.OpPing, []byte("early")) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var want [2][]byte
				keep := func(side int) func(p *peer) []byte {
					return func(p *peer) []byte {
						want[side] = early(p)
						return want[side]
					}
				}
				quiet := manners{mute: true}
				r := start(t, setup{earlyClient: keep(clientSide), earlyBackend: keep(backendSide), client: quiet, backend: quiet})
				if got := r.backend.wire(); !bytes.Equal(got, want[clientSide]) {
					t.Errorf("backend: got %x, want %x", got, want[clientSide])
				}
				if got := r.client.wire(); !bytes.Equal(got, want[backendSide]) {
					t.Errorf("client: got %x, want %x", got, want[backendSide])
				}
			})
		})
	}
}

func TestAnIncompleteFrameOfTheHandshakeIsCompletedLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var whole []byte
		r := start(t, setup{earlyClient: func(p *peer) []byte {
			whole = p.binary(5000)
			return whole[:4000]
		}})
		if got := len(r.backend.wire()); got != 0 {
			t.Errorf("got %d bytes of an incomplete frame, want none", got)
		}
		r.client.send(whole[4000:])
		synctest.Wait()
		if got := r.backend.wire(); !bytes.Equal(got, whole) {
			t.Errorf("got %d bytes, want the frame of %d", len(got), len(whole))
		}
	})
}

func TestAWriteDeadlineOfTheHandshakeIsLifted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := prepare(t, registry.New(), setup{})
		for _, leg := range r.legs {
			_ = leg.SetWriteDeadline(time.Now().Add(time.Second))
		}
		r.open()
		go r.run()
		r.pass(time.Minute)
		r.client.send(r.client.text("up"))
		r.backend.send(r.backend.text("down"))
		synctest.Wait()
		up, _ := r.backend.messages()
		down, _ := r.client.messages()
		if !slices.Equal(up, []string{"up"}) || !slices.Equal(down, []string{"down"}) {
			t.Errorf("got %q and %q, want both messages", up, down)
		}
	})
}

func TestOnlyPongsToOurOwnPingsAreSwallowed(t *testing.T) {
	bothWays(t, setup{}, func(t *testing.T, r *rig, from, to *peer) {
		nonce := r.ownPing()
		from.send(
			from.text("before"),
			from.frame(true, 0, ws.OpPong, nonce),
			from.frame(true, 0, ws.OpPong, nonce[:15]),
			from.frame(true, 0, ws.OpPong, nil),
			from.frame(false, 0, ws.OpText, []byte("in a")),
			from.frame(true, 0, ws.OpPong, nonce),
			from.frame(true, 0, ws.OpContinuation, []byte(" message")),
			from.frame(true, 0, ws.OpPong, bytes.Repeat(nonce, 2)),
		)
		synctest.Wait()
		var got []string
		for _, f := range to.received() {
			got = append(got, string(f.payload))
		}
		want := []string{"before", string(nonce[:15]), "", "in a", " message", strings.Repeat(string(nonce), 2)}
		if !slices.Equal(got, want) {
			t.Errorf("got %q, want %q", got, want)
		}
	})
}

func TestPingsPassEndToEnd(t *testing.T) {
	bothWays(t, setup{}, func(t *testing.T, r *rig, from, to *peer) {
		from.send(from.frame(true, 0, ws.OpPing, []byte("are you there?")))
		synctest.Wait()
		for p, want := range map[*peer]ws.OpCode{to: ws.OpPing, from: ws.OpPong} {
			got := p.received()
			if len(got) != 1 || got[0].head.OpCode != want || string(got[0].payload) != "are you there?" {
				t.Errorf("got %v, want one frame, opcode %d, with the payload", got, want)
			}
		}
	})
}

func TestASlowReaderSlowsItsWriterAndNothingElse(t *testing.T) {
	bothWays(t, setup{}, func(t *testing.T, r *rig, from, to *peer) {
		to.stall()
		message := from.binary(1000)
		const n = 1000
		for range n {
			from.send(message)
		}
		to.send(to.text("the other way"))
		r.pass(10 * time.Second)
		if got, _ := from.messages(); !slices.Equal(got, []string{"the other way"}) {
			t.Errorf("got %q the other way, want the message", got)
		}
		if room := from.conn.room(); room != 0 {
			t.Errorf("got room for %d bytes more, want the writer held up", room)
		}
		to.resume()
		synctest.Wait()
		if got, want := to.wire(), bytes.Repeat(message, n); !bytes.Equal(got, want) {
			t.Errorf("got %d bytes after the pause, want all %d", len(got), len(want))
		}
	})
}
