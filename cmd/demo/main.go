// Command demo shows Holdfast in a browser: it runs Caddy with a
// websocket_proxy in front of two small backends, and a page that talks to
// them and watches the connection registry. It needs nothing but Go:
//
//	go run ./cmd/demo [--listen 127.0.0.1:8080] [--admin 127.0.0.1:2019]
//
// This file holds the command line and the order of starting and stopping.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
	"slices"
	"syscall"

	"github.com/caddyserver/caddy/v2"
)

func main() {
	args := os.Args[1:]
	if len(args) > 0 && args[0] == "backend" {
		os.Exit(exitCode(backendMain(args[1:])))
	}
	os.Exit(exitCode(demoMain(args)))
}

// backendMain is the process that a child runs. A Ctrl-C in the terminal
// reaches it as well as the demo; it is the demo that decides, so that Caddy
// stops before its backends do.
func backendMain(args []string) error {
	signal.Ignore(os.Interrupt)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()

	flags := flag.NewFlagSet("demo backend", flag.ContinueOnError)
	name := flags.String("name", "backend", "`name` that the answers carry")
	listen := flags.String("listen", "127.0.0.1:0", "`address` to listen on, port 0 for a free port")
	if err := parse(flags, args); err != nil {
		return err
	}
	return runBackend(ctx, *name, *listen, os.Stdin, os.Stdout)
}

func demoMain(args []string) error {
	flags := flag.NewFlagSet("demo", flag.ContinueOnError)
	listen := flags.String("listen", "127.0.0.1:8080", "`address` of the page, port 0 for a free port")
	admin := flags.String("admin", "127.0.0.1:2019", "`address` of Caddy's admin API, port 0 for a free port")
	if err := parse(flags, args); err != nil {
		return err
	}
	return runDemo(*listen, *admin, os.Stdout)
}

func parse(flags *flag.FlagSet, args []string) error {
	if err := flags.Parse(args); err != nil {
		if !errors.Is(err, flag.ErrHelp) {
			err = errReported
		}
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", flags.Arg(0))
	}
	return nil
}

// errReported is an error that the flag package has already printed.
var errReported = errors.New("bad command line")

func exitCode(err error) int {
	switch {
	case err == nil, errors.Is(err, flag.ErrHelp):
		return 0
	case errors.Is(err, errReported):
		return 2
	}
	fmt.Fprintln(os.Stderr, "demo:", err)
	return 1
}

// runDemo returns only if the demo cannot start. From then on it ends as a
// Caddy does, on Ctrl-C, SIGTERM or POST /stop to the admin API: apps and
// plugins know that it is no reload, clients are told, and then the rest is
// stopped.
func runDemo(listen, admin string, stdout io.Writer) error {
	r, err := launch(listen, admin)
	if err != nil {
		return err
	}
	caddy.OnExit(func(context.Context) { r.stop() })
	// TrapSignals installs its handlers in goroutines, perhaps later than the
	// Ctrl-C of one who has read the URL.
	interrupted := make(chan os.Signal, 1) // the first one counts
	signal.Notify(interrupted, os.Interrupt, syscall.SIGTERM)
	caddy.TrapSignals()

	for _, c := range r.children {
		fmt.Fprintf(stdout, "backend %s on %s, process %d\n", c.name, c.address(), c.pid())
	}
	fmt.Fprintf(stdout, "registry on http://%s/connections\n", r.config.API())
	fmt.Fprintf(stdout, "\nopen %s\n\n(Ctrl-C ends it)\n", r.config.URL())
	<-interrupted
	r.end()
	select {} // until Caddy ends the process
}

// running is a demo that has started.
type running struct {
	config   demoConfig
	children []*child
	undo     []func()
}

// end asks Caddy to end the process. If it is ending already, that changes nothing.
func (r *running) end() {
	response, err := http.Post("http://"+r.config.API()+"/stop", "", nil)
	if err != nil {
		return // the admin API has ended
	}
	response.Body.Close()
}

// stop undoes all steps of launch, the last one first, but for Caddy.
func (r *running) stop() {
	for _, f := range slices.Backward(r.undo) {
		f()
	}
}

// launch starts the backends, the page and Caddy, in that order.
func launch(listen, admin string) (_ *running, err error) {
	r := new(running)
	defer func() {
		if err != nil {
			r.stop()
		}
	}()

	// Both addresses are held until Caddy takes them, so that no backend is
	// given one of them as its free port.
	site, err := reserve("--listen", listen)
	if err != nil {
		return nil, err
	}
	defer site.Close()
	api, err := reserve("--admin", admin)
	if err != nil {
		return nil, err
	}
	defer api.Close()
	r.config.Listen, r.config.Admin = site.Addr().String(), api.Addr().String()

	for _, name := range []string{"alder", "birch"} {
		c := newChild(name)
		if err := c.start(); err != nil {
			return nil, err
		}
		r.undo = append(r.undo, c.stop)
		r.children = append(r.children, c)
		r.config.Backends = append(r.config.Backends, c.address())
	}

	front, err := startFront(r.children...)
	if err != nil {
		return nil, err
	}
	r.undo = append(r.undo, front.stop)
	r.config.Front = front.address()

	r.config.Storage, err = os.MkdirTemp("", "holdfast-demo-")
	if err != nil {
		return nil, fmt.Errorf("making a directory for Caddy's storage: %w", err)
	}
	r.undo = append(r.undo, func() { os.RemoveAll(r.config.Storage) })

	site.Close()
	api.Close()
	if err := startCaddy(&r.config); err != nil {
		return nil, err
	}
	return r, nil
}
