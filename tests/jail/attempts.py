"""What a program in the jail tries. Each raises OSError inside, and works in a process that is not jailed."""

READS = {
    "the users of the machine": "open('/etc/passwd').read()",
    "its own description": "open('/proc/self/environ', 'rb').read()",
    "the environment of its parent": "open(f'/proc/{os.getppid()}/environ', 'rb').read()",
    "the memory map of its parent": "open(f'/proc/{os.getppid()}/maps').read()",
    "the first process": "open('/proc/1/cmdline', 'rb').read()",
    "the root": "os.listdir('/')",
    "the home": "os.listdir(HOME)",
    "the folder of all scratch": "os.listdir(os.path.dirname(os.getcwd()))",
    "this repository": "open(REPOSITORY).read()",
    "a file of the test": "open(FOLDER + '/secret').read()",
    "by a link": "os.symlink(FOLDER + '/secret', 'link'); open('link').read()",
    "by a way up": "open('../' * 40 + FOLDER + '/secret').read()",
    "by a folder it goes to": "os.chdir(FOLDER); open('secret').read()",
    "by a descriptor of a folder": "os.open('secret', os.O_RDONLY, dir_fd=os.open(FOLDER, os.O_RDONLY))",
    "a descriptor of its parent": "os.readlink(f'/proc/{os.getppid()}/fd/0')",
    "installed packages": "open(SITE + '/' + next(f for f in os.listdir(SITE) if f.endswith('.py'))).read()",
}

WRITES = {
    "a new file": "open(FOLDER + '/new', 'w').write('x')",
    "an old file": "open(FOLDER + '/secret', 'a').write('')",
    "a shorter file": "os.truncate(FOLDER + '/secret', 6)",
    "a file cut by reading": "os.open(FOLDER + '/spare4', os.O_RDONLY | os.O_TRUNC)",
    "a file cut by neither": "os.open(FOLDER + '/spare4', os.O_RDONLY | os.O_TRUNC | 3)",
    "Python's own file": "os.open(os.__file__, os.O_RDWR)",
    "a folder": "os.mkdir(FOLDER + '/folder')",
    "a removal": "os.remove(FOLDER + '/spare')",
    "a rename": "os.rename(FOLDER + '/spare2', FOLDER + '/spare3')",
    "a move out": "open('mine', 'w').close(); os.rename('mine', FOLDER + '/moved')",
    "a hard link": "os.link(FOLDER + '/secret', 'linked')",
    "a mode": "os.chmod(FOLDER + '/secret', 0o600)",
    "a read attribute": "os.listxattr(FOLDER + '/secret')",
    "a mode by descriptor": "os.fchmod(os.open(os.__file__, os.O_RDONLY), os.stat(os.__file__).st_mode & 0o777)",
    "a time": "os.utime(FOLDER + '/secret')",
    "an owner": "os.chown(FOLDER + '/secret', os.getuid(), -1)",
    "an attribute": "os.setxattr(FOLDER + '/secret', 'user.kdlm', b'x')",
}

NETWORK = {
    "TCP": "socket.create_connection(('127.0.0.1', TCP), timeout=5).sendall(b'x')",
    "UDP": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', UDP))",
    "a listener": "socket.create_server(('127.0.0.1', 0))",
    "a socket with a path": "socket.socket(socket.AF_UNIX).connect(FOLDER + '/socket')",
    "a socket with a name": "socket.socket(socket.AF_UNIX).connect('\\0' + NAME)",
    "a pair turned elsewhere": (
        "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].connect(FOLDER + '/datagrams')"
    ),
    "a pair that sends elsewhere": (
        "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b'x', FOLDER + '/datagrams')"
    ),
    "a pair that sends a message elsewhere": (
        "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendmsg([b'x'], [], 0, FOLDER + '/datagrams')"
    ),
    "an option of a pair": "socket.socketpair()[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)",
    "a netlink": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
}

PROCESSES = {
    "a fork": "os.fork() or os._exit(0)",
    "a program": "import subprocess; subprocess.run(['/bin/true'], check=True)",
    "a Python": "import subprocess; subprocess.run([sys.executable, '-c', ''], check=True)",
    "a shell": "if os.system('true'): raise OSError",
    "a signal to its parent": "os.kill(os.getppid(), signal.SIGUSR2)",
    "a look at its parent": "os.kill(os.getppid(), 0)",
    "a signal to all of its group": "os.kill(0, 0)",
    "a signal by descriptor": "fcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())",
    "its parent's limits": "resource.prlimit(os.getppid(), resource.RLIMIT_CORE)",
    "its parent's processors": "os.sched_setaffinity(os.getppid(), os.sched_getaffinity(0))",
    "its parent's turn": "os.setpriority(os.PRIO_PROCESS, os.getppid(), os.getpriority(os.PRIO_PROCESS, os.getppid()))",
    "a lease, for which others have to wait": (
        "open('mine', 'w').close(); fcntl.fcntl(os.open('mine', os.O_RDONLY), fcntl.F_SETLEASE, fcntl.F_RDLCK)"
    ),
    "memory without an owner": "os.close(os.memfd_create('x'))",
}

PREAMBLE = "import fcntl, os, resource, signal, socket, sys\n"
