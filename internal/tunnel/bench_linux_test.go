// This file measures what a tunnel costs, side by side with a pair of io.Copy.

package tunnel

import (
	"io"
	"net"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
)

// relays are what is compared. Each returns how to wait for its end.
var relays = []struct {
	name  string
	relay func(b *testing.B, client, backend net.Conn) (wait func())
}{
	{"tunnel", benchTunnel},
	{"io.Copy", benchCopy},
	{"copied", func(b *testing.B, client, backend net.Conn) func() {
		return benchTunnel(b, struct{ net.Conn }{client}, struct{ net.Conn }{backend})
	}},
}

// benchRegistry is one for all, as in a process: its metrics are most of an empty one.
var benchRegistry = registry.New()

func benchTunnel(b *testing.B, client, backend net.Conn) (wait func()) {
	r := prepare(b, benchRegistry, Settings{InactivityTimeout: time.Hour, InactivityGrace: time.Minute}, client, backend, "")
	r.run()
	return func() { <-r.done }
}

func benchCopy(_ *testing.B, client, backend net.Conn) (wait func()) {
	var both sync.WaitGroup
	one := func(dst, src net.Conn) {
		_, _ = io.Copy(dst, src)
		_ = dst.(interface{ CloseWrite() error }).CloseWrite()
	}
	both.Go(func() { one(backend, client) })
	both.Go(func() { one(client, backend) })
	return func() {
		both.Wait()
		_, _ = client.Close(), backend.Close()
	}
}

// cpu is what the process has used, which includes both peers.
func cpu() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// Messages of 64 bytes, each answered before the next.
func BenchmarkPingPong(b *testing.B) {
	for _, kind := range relays {
		b.Run(kind.name, func(b *testing.B) {
			nearClient, client := tcpPair(b)
			nearBackend, backend := tcpPair(b)
			_, _ = client.SetDeadline(time.Time{}), backend.SetDeadline(time.Time{})
			wait := kind.relay(b, nearClient, nearBackend)
			go func() {
				buf := make([]byte, 64)
				for {
					if _, err := io.ReadFull(backend, buf); err != nil {
						_ = backend.CloseWrite()
						return
					}
					_, _ = backend.Write(buf)
				}
			}()
			buf := make([]byte, 64)
			b.ReportAllocs()
			before := cpu()
			for b.Loop() {
				_, _ = client.Write(buf)
				if _, err := io.ReadFull(client, buf); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64((cpu()-before).Nanoseconds())/float64(b.N), "cpu-ns/op")
			_ = client.CloseWrite()
			wait()
		})
	}
}

// One way, as fast as it goes, in writes of 256 KiB. The peers' own cost is in it.
func BenchmarkBulk(b *testing.B) {
	const size = 256 << 10
	for _, kind := range relays {
		b.Run(kind.name, func(b *testing.B) {
			nearClient, client := tcpPair(b)
			nearBackend, backend := tcpPair(b)
			_, _ = client.SetDeadline(time.Time{}), backend.SetDeadline(time.Time{})
			wait := kind.relay(b, nearClient, nearBackend)
			read := make(chan struct{})
			go func() {
				defer close(read)
				buf := make([]byte, size)
				for {
					if _, err := backend.Read(buf); err != nil {
						_ = backend.CloseWrite()
						return
					}
				}
			}()
			buf := make([]byte, size)
			b.SetBytes(size)
			b.ReportAllocs()
			before := cpu()
			for b.Loop() {
				if _, err := client.Write(buf); err != nil {
					b.Fatal(err)
				}
			}
			_ = client.CloseWrite()
			<-read
			b.ReportMetric((cpu()-before).Seconds()/(float64(b.N)*size/1e9), "cpu-s/GB")
			wait()
		})
	}
}

// What an idle tunnel costs beside its four sockets, after it has relayed 64 KiB each way.
func BenchmarkIdleMemory(b *testing.B) {
	const pairs = 1000
	for _, kind := range relays {
		b.Run(kind.name, func(b *testing.B) {
			for b.Loop() {
				var far []*net.TCPConn
				var near []net.Conn
				for range pairs {
					nearClient, client := tcpPair(b)
					nearBackend, backend := tcpPair(b)
					far, near = append(far, client, backend), append(near, nearClient, nearBackend)
				}
				before := inUse()
				var waits []func()
				for i := 0; i < len(near); i += 2 {
					waits = append(waits, kind.relay(b, near[i], near[i+1]))
				}
				buf := make([]byte, 64<<10)
				for i := 0; i < len(far); i += 2 {
					for _, way := range [][2]*net.TCPConn{{far[i], far[i+1]}, {far[i+1], far[i]}} {
						go func() { _, _ = way[0].Write(buf) }()
						if _, err := io.ReadFull(way[1], buf); err != nil {
							b.Fatal(err)
						}
					}
				}
				b.ReportMetric(float64(inUse()-before)/pairs/1024, "KiB/pair")
				for _, c := range far {
					_ = c.CloseWrite()
				}
				for _, wait := range waits {
					wait()
				}
				for _, c := range far {
					_ = c.Close()
				}
			}
		})
	}
}

// inUse is the memory of heap and stacks.
func inUse() int64 {
	var m runtime.MemStats
	for range 3 {
		runtime.GC()
	}
	runtime.ReadMemStats(&m)
	return int64(m.HeapInuse + m.StackInuse)
}
